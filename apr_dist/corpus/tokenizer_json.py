"""What a tokenizer.json says: vocabulary, merges, added tokens, and whether it works on bytes.

Lives here: reading and checking that file's fields. Encoding with it is the ``tokenizers`` library's
work, opened in ``tokenizer``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from apr_dist.errors import TokenizerError
from apr_dist.parsing import parse_json

FALSIFIER_NOT_BPE = "FALSIFY-TOK-IMPORT-HF-005"


@dataclass(frozen=True)
class TokenizerJson:
    """The fields of a tokenizer.json that identify it.

    Attributes:
        vocabulary: the model's own tokens with their ids.
        merges: BPE merges in order of rank.
        added: added tokens (special or not) with their ids; some may be in ``vocabulary`` too.
        byte_level: text is cut by a pattern and mapped byte by byte onto the GPT-2 alphabet.
    """

    vocabulary: dict[str, int]
    merges: list[tuple[str, str]]
    added: dict[str, int]
    byte_level: bool

    @cached_property
    def effective_vocabulary(self) -> dict[str, int]:
        """Every token a text can become, with its id."""
        return self.vocabulary | self.added


def parse_tokenizer_json(content: bytes, *, where: Path) -> TokenizerJson:
    """Read the bytes of a tokenizer.json.

    Raises:
        TokenizerError: not JSON, another kind than BPE (named), or fields of a wrong type.
    """
    try:
        recorded = parse_json(content)
    except ValueError as error:
        raise TokenizerError(f"it is not JSON ({error})", where=where, expected="a tokenizer.json") from error
    model = recorded.get("model") if isinstance(recorded, dict) else None
    if not isinstance(model, dict):
        raise TokenizerError("it has no `model` object", where=where, expected="a tokenizer.json")
    kind = model.get("type", "BPE" if "merges" in model else "of an unnamed kind")
    if kind != "BPE":
        raise TokenizerError(
            f"the tokenizer is {kind}",
            where=where,
            expected="a BPE tokenizer (Unigram, WordPiece and WordLevel are not supported)",
            falsifier=FALSIFIER_NOT_BPE,
        )
    try:
        facts = TokenizerJson(
            vocabulary={str(token): int(one) for token, one in model["vocab"].items()},
            merges=[_pair(merge) for merge in model["merges"]],
            added={str(one["content"]): int(one["id"]) for one in recorded.get("added_tokens") or ()},
            byte_level=any(part.get("type") == "ByteLevel" for part in _parts(recorded.get("pre_tokenizer"))),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"its fields are malformed ({error!r})", where=where) from error
    _check_ids(facts, where)
    return facts


def byte_alphabet() -> dict[int, str]:
    """The GPT-2 map from bytes to printable characters, in which byte-level tokens are spelled.

    Printable Latin-1 bytes stand for themselves, the other 68 for U+0100 and up in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in printable:
            alphabet[byte] = chr(0x100 + len(alphabet) - len(printable))
    return alphabet


def unencodable_bytes(facts: TokenizerJson) -> bytes:
    """Bytes that occur in UTF-8 text and for which a byte-level vocabulary has no token."""
    if not facts.byte_level:
        return b""
    never_in_utf8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
    missing = (byte for byte, letter in byte_alphabet().items() if letter not in facts.vocabulary)
    return bytes(sorted(byte for byte in missing if byte not in never_in_utf8))


def _pair(merge: object) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
        raise TypeError(f"the merge {merge!r}")
    return parts[0], parts[1]


def _parts(pre_tokenizer: object) -> Iterator[dict[str, object]]:
    """A pre-tokenizer and, when it is a sequence, what it is made of."""
    if isinstance(pre_tokenizer, dict):
        yield pre_tokenizer
        for part in pre_tokenizer.get("pretokenizers", ()):
            yield from _parts(part)


def _check_ids(facts: TokenizerJson, where: Path) -> None:
    if not facts.vocabulary:
        raise TokenizerError("its vocabulary is empty", where=where)
    effective = facts.effective_vocabulary
    if any(not 0 <= one < 2**32 for one in effective.values()) or len(set(effective.values())) < len(
        effective
    ):
        raise TokenizerError("two tokens share an id, or an id is out of range", where=where)
    contradicting = [
        token
        for token in facts.added
        if facts.vocabulary.get(token, facts.added[token]) != facts.added[token]
    ]
    if contradicting:
        raise TokenizerError(
            f"the added token {contradicting[0]!r} has another id in the vocabulary", where=where
        )
