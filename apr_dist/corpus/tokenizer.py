"""Tokenizer folders: importing a tokenizer.json into one, and opening it for encoding.

A folder holds ``tokenizer.json`` (the tokenizer itself), ``vocab.json`` and ``merges.txt`` (for readers of
the older form) and ``tokenizer_info.json`` (counts and ids). Other sources (GGUF, .tiktoken, APR) are
turned into a tokenizer.json in ``interop.tokenizers``; encoding a corpus lives in ``encode``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.normalizers import NFC

from apr_dist.atomic_files import write_atomically, writing_to
from apr_dist.corpus.tokenizer_json import TokenizerJson, parse_tokenizer_json, unencodable_bytes
from apr_dist.data.manifest_file import TokenizerIdentity
from apr_dist.errors import OutputError, TokenizerError
from apr_dist.parsing import parse_json

TOKENIZER_NAME = "tokenizer.json"
INFO_NAME = "tokenizer_info.json"

_BEFORE_A_NEWLINE = ("a", "Z", "0", " word", "\n\tword", "x1", "1x", "12345", "don't", "\u00e9t\u00e9s", "(a")
_FROM_A_NEWLINE = tuple(
    newline + text
    for newline in ("\n", "\n\n", "\n \n", "\n\r\n")
    for text in ("", "a", "A", "1", " a", "  a", "\ta", "!", "'s", "\u00e9", "\u4e2d", "(x", "\r")
)
"""What may stand on both sides of a cut; see `_cuts_at_newlines`."""


@dataclass(frozen=True)
class LoadedTokenizer:
    """An open tokenizer folder.

    Attributes:
        folder: where it lies.
        identity: counts, ids and hash.
        tokenizer: the ``tokenizers`` object, set to neither pad nor truncate, and, without
            ``parse_special``, to read the text of a special token as plain text (a document that contains
            ``<|endoftext|>`` does not end there).
        unencodable: bytes that occur in UTF-8 and that the vocabulary has no token for; text with them
            loses them when encoded, so the encoder counts such documents.
        specials: texts of the special tokens, which are encoded as plain text unless ``parse_special`` was
            asked for; None where it was.
        cuttable: a text may be encoded in pieces cut between a letter or digit and a newline, with the
            same ids.
    """

    folder: Path
    identity: TokenizerIdentity
    tokenizer: Tokenizer
    unencodable: bytes
    cuttable: bool
    specials: re.Pattern[str] | None = None

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Ids of ``text``: [tokens] u32, without any special token added."""
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def decode(self, ids: Sequence[int] | NDArray[np.uint32]) -> str:
        """The text of ``ids``, special tokens included."""
        return str(self.tokenizer.decode([int(one) for one in ids], skip_special_tokens=False))

    def loses(self, text: str) -> int:
        """How many bytes of ``text`` the vocabulary cannot express."""
        if not self.unencodable:
            return 0
        raw = text.encode()
        return len(raw) - len(raw.translate(None, self.unencodable))

    def count_specials(self, text: str) -> int:
        """How many special tokens stand in ``text`` and are encoded as plain text."""
        return 0 if self.specials is None else sum(1 for _ in self.specials.finditer(text))


def load_tokenizer(folder: Path, *, parse_special: bool = False) -> LoadedTokenizer:
    """Open a tokenizer folder.

    Args:
        folder: the tokenizer folder.
        parse_special: the text of a special token becomes its id.

    Raises:
        TokenizerError: no tokenizer.json, malformed, not BPE, or changed since it was imported.
    """
    path = folder / TOKENIZER_NAME
    content = _read(folder, path)
    facts = parse_tokenizer_json(content, where=path)
    identity = identify(facts, content, _declared_tokens(folder))
    _check_info(folder, identity)
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise TokenizerError(f"the tokenizers library refuses it ({error})", where=path) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = not parse_special
    tokenizer.model.dropout = None
    return LoadedTokenizer(
        folder=folder,
        identity=identity,
        tokenizer=tokenizer,
        unencodable=unencodable_bytes(facts),
        cuttable=facts.byte_level and _cuts_at_newlines(tokenizer, parse_special=parse_special),
        specials=None if parse_special else _special_texts(tokenizer),
    )


def _special_texts(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    added = tokenizer.get_added_tokens_decoder().values()
    texts = sorted((token.content for token in added if token.special and token.content), key=len)
    return re.compile("|".join(re.escape(text) for text in reversed(texts))) if texts else None


def _cuts_at_newlines(tokenizer: Tokenizer, *, parse_special: bool) -> bool:
    """Whether nothing before BPE looks across the place between a letter or digit and a newline.

    Patterns are arbitrary, so they are tried on every kind of neighbour instead of being understood.
    """
    if not isinstance(tokenizer.normalizer, NFC | None):
        return False
    added = tokenizer.get_added_tokens_decoder().values()
    parsed = [token for token in added if parse_special or not token.special]
    if any("\n" in token.content or token.rstrip for token in parsed):
        return False

    def cut(text: str) -> list[str]:
        return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    pairs = product(_BEFORE_A_NEWLINE, _FROM_A_NEWLINE)
    return all(cut(before + after) == cut(before) + cut(after) for before, after in pairs)


def import_tokenizer(
    source: Path, folder: Path, *, include_added_tokens: bool = False, overwrite: bool = False
) -> TokenizerIdentity:
    """Import a tokenizer.json (or the folder that holds one) into a tokenizer folder.

    ``vocab.json`` holds the bare BPE vocabulary, and with ``include_added_tokens`` the added tokens too;
    ``tokenizer.json`` is copied byte for byte.

    Raises:
        TokenizerError: missing, malformed, or not BPE (FALSIFY-TOK-IMPORT-HF-005).
        OutputError: the folder holds another tokenizer already, or cannot be written.
    """
    path = source / TOKENIZER_NAME if source.is_dir() else source
    content = _read(source, path)
    return write_tokenizer_folder(
        content,
        folder,
        declared=_declared_tokens(path.parent),
        where=path,
        include_added_tokens=include_added_tokens,
        overwrite=overwrite,
    )


def write_tokenizer_folder(
    content: bytes,
    folder: Path,
    *,
    declared: dict[str, str],
    where: Path,
    include_added_tokens: bool = False,
    overwrite: bool = False,
) -> TokenizerIdentity:
    """Write a tokenizer folder from the bytes of a tokenizer.json.

    Args:
        content: the tokenizer.json.
        folder: made when missing.
        declared: special tokens by role (``eos_token``, ``bos_token``, ``pad_token``), as far as known.
        where: what errors call the source.
        include_added_tokens: also list the added tokens in vocab.json.
        overwrite: replace another tokenizer that lies there.

    Raises:
        TokenizerError: malformed or not BPE.
        OutputError: the folder holds another tokenizer already, or cannot be written.
    """
    facts = parse_tokenizer_json(content, where=where)
    identity = identify(facts, content, declared)
    target = folder / TOKENIZER_NAME
    if target.exists() and not overwrite and target.read_bytes() != content:
        raise OutputError(
            "another tokenizer lies there", where=folder, remedy="choose another folder or pass --force"
        )
    vocabulary = facts.effective_vocabulary if include_added_tokens else facts.vocabulary
    by_id = dict(sorted(vocabulary.items(), key=lambda entry: entry[1]))
    info = asdict(identity) | {"declared_tokens": declared, "include_added_tokens": include_added_tokens}
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    (folder / INFO_NAME).unlink(missing_ok=True)  # a half-written folder must not claim the new identity
    write_atomically(target, content)
    write_atomically(folder / "vocab.json", json.dumps(by_id, ensure_ascii=False).encode())
    write_atomically(folder / "merges.txt", _merges_text(facts, where).encode())
    write_atomically(folder / INFO_NAME, (json.dumps(info, ensure_ascii=False, indent=1) + "\n").encode())
    return identity


def identify(facts: TokenizerJson, content: bytes, declared: dict[str, str]) -> TokenizerIdentity:
    """The identity of a tokenizer.json with the special tokens declared beside it."""
    effective = facts.effective_vocabulary
    return TokenizerIdentity(
        sha256=hashlib.sha256(content).hexdigest(),
        bpe_vocab_count=len(facts.vocabulary),
        added_tokens_count=len(effective) - len(facts.vocabulary),
        effective_vocab_count=len(effective),
        merges_count=len(facts.merges),
        eos_id=_document_end(effective, declared.get("eos_token")),
        bos_id=effective.get(declared.get("bos_token", "")),
        pad_id=effective.get(declared.get("pad_token", "")),
        id_bound=max(effective.values(), default=-1) + 1,
    )


# What ends a document, in the order tried. A chat model declares its end of turn as EOS (<|im_end|>),
# which never stood between documents when it was trained; so a declared EOS counts first only when
# it is one of these, and otherwise last.
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")


def _document_end(vocabulary: dict[str, int], declared: str | None) -> int | None:
    if declared in _DOCUMENT_ENDS and declared in vocabulary:
        return vocabulary[declared]
    candidates = [*_DOCUMENT_ENDS, declared or ""]
    return next((vocabulary[token] for token in candidates if token in vocabulary), None)


def _declared_tokens(folder: Path) -> dict[str, str]:
    """Roles of special tokens, from our info file or the tokenizer_config.json beside a tokenizer.json."""
    for name, key in ((INFO_NAME, "declared_tokens"), ("tokenizer_config.json", None)):
        path = folder / name
        if not path.is_file():
            continue
        try:
            recorded = parse_json(path.read_bytes())
        except ValueError as error:
            raise TokenizerError(f"it is not JSON ({error})", where=path) from error
        fields = recorded.get(key, {}) if key and isinstance(recorded, dict) else recorded
        if not isinstance(fields, dict):
            raise TokenizerError("it holds no JSON object", where=path, expected="special tokens by role")
        return {role: token for role in _ROLES if (token := _token_text(fields.get(role)))}
    return {}


_ROLES = ("eos_token", "bos_token", "pad_token")


def _token_text(recorded: object) -> str | None:
    """A token as recorded: its text, or an object with the text under ``content``."""
    text = recorded.get("content") if isinstance(recorded, dict) else recorded
    return text if isinstance(text, str) else None


def _check_info(folder: Path, identity: TokenizerIdentity) -> None:
    path = folder / INFO_NAME
    if not path.is_file():
        return
    recorded = parse_json(path.read_bytes())
    if recorded.get("sha256") != identity.sha256:
        raise TokenizerError(
            f"tokenizer.json changed after its import (sha256 {identity.sha256[:16]}...)",
            where=folder,
            expected=f"sha256 {str(recorded.get('sha256'))[:16]}..., as {INFO_NAME} says",
            remedy=f"import it again: apr-dist tokenize import-hf SRC -o {folder} --force",
        )


def _merges_text(facts: TokenizerJson, where: Path) -> str:
    for left, right in facts.merges:
        if any(letter.isspace() and letter in " \n\r\t" for letter in left + right):
            raise TokenizerError(
                f"the merge {left!r} + {right!r} holds a space",
                where=where,
                expected="merges of plain tokens",
            )
    return "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in facts.merges)


def _read(source: Path, path: Path) -> bytes:
    if path.exists() and not path.is_file():  # reading a FIFO would wait for ever
        raise TokenizerError("it is no regular file", where=path, expected="a tokenizer.json")
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise TokenizerError(
            "there is no tokenizer.json",
            where=source,
            expected="a tokenizer folder",
            remedy=f"make one: apr-dist tokenize import-hf SRC -o {source}",
        ) from error
    except OSError as error:
        raise TokenizerError(f"it cannot be read ({error.strerror})", where=path) from error
