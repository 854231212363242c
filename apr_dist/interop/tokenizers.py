"""Tokenizers of other formats: a GGUF's embedded vocabulary and a Qwen .tiktoken file to a tokenizer.json.

Lives here: rebuilding the ``tokenizers`` description (pre-tokenizer, merges, added tokens) that those
files only imply, and telling the formats apart. SentencePiece's is in ``sentencepiece_bpe``; the tokenizer
folder itself is ``data.tokenizer``'s.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from apr_dist.apr.layout import TOKENIZER_TEXT
from apr_dist.apr.reader import AprReader
from apr_dist.corpus.tokenizer import import_tokenizer, write_tokenizer_folder
from apr_dist.corpus.tokenizer_json import byte_alphabet, parse_tokenizer_json
from apr_dist.data.manifest import TokenizerIdentity
from apr_dist.errors import TokenizerError
from apr_dist.interop.gguf_file import GgufFile
from apr_dist.interop.post_processor import post_processor
from apr_dist.interop.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from apr_dist.interop.sentencepiece_bpe import AddedToken, TokenType, describe_sentencepiece, tokenizer_json


def import_any_tokenizer(
    source: Path, folder: Path, *, include_added_tokens: bool = False, overwrite: bool = False
) -> TokenizerIdentity:
    """Import the tokenizer of ``source`` into a tokenizer folder, whatever its format.

    Args:
        source: a GGUF, an APR that embeds its tokenizer, a Qwen ``.tiktoken``, a tokenizer.json, or a folder
            that holds a tokenizer.json.
        folder: the tokenizer folder to write.
        include_added_tokens: also list the added tokens in vocab.json.
        overwrite: replace another tokenizer that lies there.

    Raises:
        TokenizerError: no tokenizer in it, or one of a kind that is not supported, named.
        OutputError: the folder cannot be written or holds another tokenizer.
    """
    try:
        with source.open("rb") as file:
            magic = file.read(4)
    except IsADirectoryError:
        magic = b""
    except OSError as error:
        raise TokenizerError(f"it cannot be read ({error.strerror})", where=source) from error
    if magic == b"GGUF":
        content, declared = tokenizer_json_from_gguf(source)
    elif magic == b"APR\0":
        content, declared = tokenizer_json_from_apr(source)
    elif source.suffix == ".tiktoken":
        content, declared = tokenizer_json_from_tiktoken(source)
    else:
        return import_tokenizer(
            source, folder, include_added_tokens=include_added_tokens, overwrite=overwrite
        )
    return write_tokenizer_folder(
        content,
        folder,
        declared=declared,
        where=source,
        include_added_tokens=include_added_tokens,
        overwrite=overwrite,
    )


def tokenizer_json_from_gguf(path: Path) -> tuple[bytes, dict[str, str]]:
    """The tokenizer.json that a GGUF's embedded vocabulary describes, and its declared special tokens.

    Tokens of type control or user-defined become added tokens; those beyond the last normal token stay out
    of the model's own vocabulary, and unused rows (padding of the embedding) are no tokens at all. The
    vocabulary's own ids are kept.

    Raises:
        TokenizerError: no embedded tokenizer, no BPE, or a pre-tokenizer that is not known.
    """
    fields = _gguf_tokenizer_fields(path)
    kind = fields.get("model")
    if kind not in ("gpt2", "llama"):
        raise TokenizerError(
            f"its tokenizer is {kind!r} (Unigram or WordPiece)" if kind else "it embeds no tokenizer",
            where=path,
            expected="a GGUF with a BPE vocabulary (tokenizer.ggml.model gpt2 or llama)",
            falsifier="FALSIFY-TOK-IMPORT-HF-005" if kind else None,
        )
    tokens = _strings(fields, "tokens", path)
    types = _token_types(fields, len(tokens), path)
    if kind == "llama":
        scores = np.asarray(fields.get("scores", np.zeros(0))).tolist()
        if len(scores) != len(tokens):
            raise TokenizerError(f"{len(tokens)} tokens but {len(scores)} scores", where=path)
        ends = _ends(fields, tokens, path, add_bos=True)
        prefixed = fields.get("add_space_prefix", True) is True
        return describe_sentencepiece(tokens, types, scores, ends, prefixed=prefixed), _declared(
            fields, tokens
        )
    name = str(fields.get("pre", "default"))
    if name not in PRE_TOKENIZERS:
        raise _unusable(
            path, f"its pre-tokenizer {name!r} is not known", f"one of {', '.join(PRE_TOKENIZERS)}"
        )
    if fields.get("add_space_prefix", False) is True:
        what = "its byte-level tokenizer puts a space before a text"
        raise _unusable(path, what, "tokenizer.ggml.add_space_prefix false")
    last_normal = max((one for one, kind in enumerate(types) if kind == TokenType.NORMAL), default=-1)
    whole = (TokenType.CONTROL, TokenType.USER_DEFINED)
    content = _describe(
        vocabulary={
            token: one
            for one, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind == TokenType.NORMAL or (kind != TokenType.UNUSED and one < last_normal)
        },
        merges=[_split_merge(merge, path) for merge in _strings(fields, "merges", path)],
        added=[
            AddedToken(token, one, kind == TokenType.CONTROL)
            for one, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in whole
        ],
        pre_tokenizer=PRE_TOKENIZERS[name],
        around=_ends(fields, tokens, path, add_bos=PRE_TOKENIZERS[name].add_bos),
    )
    return content, _declared(fields, tokens)


def _ends(
    fields: dict[str, object], tokens: list[str], path: Path, *, add_bos: bool
) -> dict[str, Any] | None:
    """The post-processor that puts the tokens around a text which llama.cpp puts there."""
    found: list[tuple[str, int] | None] = []
    for name, default in (("bos", add_bos), ("eos", False)):
        stated, index = fields.get(f"add_{name}_token"), fields.get(f"{name}_token_id")
        known = isinstance(index, int) and 0 <= index < len(tokens)
        if stated is True and not known:
            what = f"it begins or ends texts with a token ({name}) that it does not name"
            raise _unusable(path, what, f"tokenizer.ggml.{name}_token_id")
        put = known and (default if stated is None else stated is True)
        found.append((tokens[int(str(index))], int(str(index))) if put else None)
    return post_processor(found[0], found[1])


def _unusable(path: Path, what: str, expected: str) -> TokenizerError:
    remedy = "import the model's tokenizer.json instead"
    return TokenizerError(what, where=path, expected=expected, remedy=remedy)


def _gguf_tokenizer_fields(path: Path) -> dict[str, object]:
    prefix = "tokenizer.ggml."
    with GgufFile(path) as file:
        return {
            key.removeprefix(prefix): value for key, value in file.fields.items() if key.startswith(prefix)
        }


def _strings(fields: dict[str, object], key: str, path: Path) -> list[str]:
    found = fields.get(key)
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise TokenizerError(f"tokenizer.ggml.{key} is missing or no list of strings", where=path)
    return found


def _token_types(fields: dict[str, object], count: int, path: Path) -> list[int]:
    """What each token is; a GGUF without the array has normal tokens only."""
    found = fields.get("token_type")
    if found is None:
        return [TokenType.NORMAL] * count
    types = np.asarray(found).tolist()
    if len(types) != count:
        raise TokenizerError(f"{count} tokens but {len(types)} token types", where=path)
    return [int(kind) for kind in types]


def _split_merge(merge: str, path: Path) -> tuple[str, str]:
    left, separator, right = merge.partition(" ")
    if not (left and separator and right) or " " in right:
        raise TokenizerError(f"the merge {merge!r} is not two tokens", where=path)
    return left, right


def tokenizer_json_from_apr(path: Path) -> tuple[bytes, dict[str, str]]:
    """The tokenizer.json that an APR file carries as text under the metadata key ``tokenizer.json``.

    Raises:
        TokenizerError: it carries none.
    """
    with AprReader(path, verify="structure") as reader:
        custom = reader.metadata.custom
    text = custom.get(TOKENIZER_TEXT)
    if not isinstance(text, str):
        raise TokenizerError(
            "it embeds no tokenizer.json",
            where=path,
            expected="the text of one under the metadata key `tokenizer.json`",
            remedy="import the tokenizer of the model's original files",
        )
    facts = parse_tokenizer_json(text.encode(), where=path)
    by_id = {one: token for token, one in facts.effective_vocabulary.items()}
    roles = {role: custom.get(f"tokenizer.{role}_id") for role in ("eos_token", "bos_token", "pad_token")}
    return text.encode(), {
        role: by_id[one] for role, one in roles.items() if isinstance(one, int) and one in by_id
    }


def _declared(fields: dict[str, object], tokens: list[str]) -> dict[str, str]:
    roles = {"eos_token": "eos_token_id", "bos_token": "bos_token_id", "pad_token": "padding_token_id"}
    found = {role: fields.get(key) for role, key in roles.items()}
    return {role: tokens[one] for role, one in found.items() if isinstance(one, int) and one < len(tokens)}


# The 22 tokens that Qwen2.5 adds to its 151,643 byte-level entries, in id order; the first 14 carry no text.
_QWEN_BASE_ENTRIES = 151_643
_QWEN_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
_QWEN_PLAIN = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)


def tokenizer_json_from_tiktoken(path: Path) -> tuple[bytes, dict[str, str]]:
    """The tokenizer.json of Qwen2.5 from its ``.tiktoken`` file of ranked byte strings.

    Such a file holds neither pattern nor special tokens, so only the known 151,643-entry vocabulary is
    taken. The merge that makes an entry is found by merging its bytes with all lower ranks, which
    leaves two parts.

    Raises:
        TokenizerError: malformed, or another vocabulary.
    """
    ranks = _read_ranks(path)
    if len(ranks) != _QWEN_BASE_ENTRIES or sorted(ranks.values()) != list(range(_QWEN_BASE_ENTRIES)):
        expected = f"the Qwen vocabulary of {_QWEN_BASE_ENTRIES} entries (a .tiktoken file does not say which"
        expected += " pattern and special tokens belong to it)"
        raise _unusable(path, f"it holds {len(ranks)} entries", expected)
    alphabet = byte_alphabet()

    def spelled(raw: bytes) -> str:
        return "".join(alphabet[byte] for byte in raw)

    added = [AddedToken(token, len(ranks) + one, True) for one, token in enumerate(_QWEN_SPECIAL)]
    added += [
        AddedToken(token, len(ranks) + len(added) + one, False) for one, token in enumerate(_QWEN_PLAIN)
    ]
    content = _describe(
        vocabulary={spelled(raw): rank for raw, rank in ranks.items()},
        merges=[(spelled(left), spelled(right)) for left, right in merges_from_ranks(ranks)],
        added=added,
        pre_tokenizer=PRE_TOKENIZERS["qwen2"],
    )
    return content, {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}


def merges_from_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge behind every entry longer than one byte, in order of rank."""
    merges = []
    for entry, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(entry) > 1:
            parts = _merge_below(entry, ranks, rank)
            if len(parts) == 2:
                merges.append((parts[0], parts[1]))
    return merges


def _merge_below(entry: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """The parts of ``entry`` after every merge of a rank below ``limit``, lowest rank first."""
    parts = [entry[one : one + 1] for one in range(len(entry))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        lowest = min(pairs)
        if lowest >= limit:
            break
        place = pairs.index(lowest)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            entry, rank = line.split()
            ranks[base64.b64decode(entry, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(
                f"line {number} is malformed", where=path, expected="base64 of the bytes, then the rank"
            ) from error
    return ranks


def _describe(
    *,
    vocabulary: dict[str, int],
    merges: Iterable[tuple[str, str]],
    added: list[AddedToken],
    pre_tokenizer: PreTokenizer,
    around: dict[str, Any] | None = None,
) -> bytes:
    """A tokenizer.json for a byte-level BPE."""
    level = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return tokenizer_json(
        vocabulary=vocabulary,
        merges=merges,
        added=added,
        normalizer={"type": "NFC"} if pre_tokenizer.nfc else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": list(pre_tokenizer.steps)},
        post_processor=around,
        decoder={"type": "ByteLevel", **level},
        ignore_merges=pre_tokenizer.ignore_merges,
    )
