"""A tokenizer inside an APR file: folder to metadata keys, and back to the files it came from.

``tokenizer.vocabulary``, ``tokenizer.merges`` and their neighbours are what other readers of the format
look for; ``tokenizer.json`` holds the complete description as text, and ``apr_dist.files`` the small
files that lay beside it, so that a folder comes out as it went in.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from apr_dist.apr.files import map_readonly
from apr_dist.apr.layout import MAX_METADATA_BYTES, TOKENIZER_TEXT, VOCABULARY
from apr_dist.apr.metadata import AprMetadata
from apr_dist.corpus.tokenizer_json import parse_tokenizer_json
from apr_dist.errors import TokenizerError
from apr_dist.parsing import parse_json

FILES_KEY: Final = "apr_dist.files"

END_IDS_KEY: Final = "apr_dist.end_token_ids"
"""Custom metadata key: ids of all tokens at which generation stops, where there are several."""

COMPANIONS: Final = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""Files of a model folder, besides config and weights, that travel with the model."""

_DERIVED = ("vocab.json", "merges.txt")  # contained in tokenizer.json; dropped first when space is short
_ROLES = {"bos_token_id": "bos_token", "eos_token_id": "eos_token", "pad_token_id": "pad_token"}
_ROOM_BYTES = MAX_METADATA_BYTES - (1 << 20)  # leaves a megabyte for everything else


def embed_tokenizer(metadata: AprMetadata, folder: Path) -> tuple[AprMetadata, tuple[str, ...]]:
    """Metadata with the folder's tokenizer and companion files inside, and notes on what was left out.

    Without a ``tokenizer.json`` the companions alone are taken.

    Raises:
        TokenizerError: the ``tokenizer.json`` is malformed or of a kind that is not supported.
        ModelFileMissing: a file that is there cannot be read.
    """
    files = {name: _packed(folder / name) for name in COMPANIONS if (folder / name).is_file()}
    description = folder / TOKENIZER_TEXT
    if not description.is_file():
        return _with_files(metadata, files), ("no tokenizer.json: the tokenizer is not embedded",)
    content = bytes(map_readonly(description))
    return embed_text(metadata, content, files=files, where=description)


def tokens_by_id(folder: Path) -> dict[int, str]:
    """Every token of the folder's ``tokenizer.json`` by its id; empty without a usable one."""
    description = folder / TOKENIZER_TEXT
    if not description.is_file():
        return {}
    try:
        facts = parse_tokenizer_json(bytes(map_readonly(description)), where=description)
    except TokenizerError:
        return {}  # why it cannot be used is said when it is embedded
    return {one: token for token, one in facts.effective_vocabulary.items()}


def embed_text(
    metadata: AprMetadata, content: bytes, *, files: Mapping[str, Any] | None = None, where: Path
) -> tuple[AprMetadata, tuple[str, ...]]:
    """Metadata with the ``tokenizer.json`` in ``content`` inside, made to fit the format's 16 MiB.

    Raises:
        TokenizerError: malformed, of an unsupported kind, or too large even in its shortest spelling.
    """
    facts = parse_tokenizer_json(content, where=where)
    keys: dict[str, Any] = _token_keys(metadata, facts.effective_vocabulary, facts.merges)
    plain = _with_files(metadata.with_custom(keys | {TOKENIZER_TEXT: content.decode()}), files or {})
    if _fits(plain):
        return plain, ()
    needed = {name: text for name, text in (files or {}).items() if name not in _DERIVED}
    short = json.dumps(parse_json(content), ensure_ascii=False, separators=(",", ":"))
    tight = _with_files(metadata.with_custom(keys | {TOKENIZER_TEXT: short}), needed)
    if _fits(tight):
        return tight, ("tokenizer.json is embedded without its white space, to fit the 16 MiB of metadata",)
    raise TokenizerError(
        f"the tokenizer takes {len(tight.dump())} bytes of metadata",
        where=where,
        expected=f"at most {_ROOM_BYTES}",
        remedy="keep the tokenizer in a folder beside the file instead",
    )


def _token_keys(metadata: AprMetadata, vocabulary: Mapping[str, int], merges: Any) -> dict[str, Any]:
    """The keys other readers know: tokens by id (gaps empty), merges as pairs, ids of special tokens."""
    tokens = [""] * (max(vocabulary.values(), default=-1) + 1)
    for token, index in vocabulary.items():
        tokens[index] = token
    special = metadata.special_tokens or {}
    ids = {
        f"tokenizer.{key}": vocabulary[special[role]]
        for key, role in _ROLES.items()
        if isinstance(special.get(role), str) and special[role] in vocabulary
    }
    return {
        VOCABULARY: tokens,
        "tokenizer.vocab_size": len(tokens),
        "tokenizer.merges": [" ".join(merge) for merge in merges],
        "tokenizer.model_type": "BPE",
        **ids,
    }


def _with_files(metadata: AprMetadata, files: Mapping[str, Any]) -> AprMetadata:
    return metadata.with_custom({FILES_KEY: dict(files)}) if files else metadata


def _fits(metadata: AprMetadata) -> bool:
    return len(metadata.dump()) <= _ROOM_BYTES


def _packed(path: Path) -> Any:
    raw = bytes(map_readonly(path))
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(raw).decode()}


def embedded_files(metadata: AprMetadata, *, where: Path) -> dict[str, bytes]:
    """The tokenizer and companion files inside a file's metadata, by name; only names we know.

    Raises:
        TokenizerError: an embedded file is not readable text or base64.
    """
    packed: dict[str, Any] = {}
    inside = metadata.custom.get(FILES_KEY)
    if isinstance(inside, Mapping):
        packed |= {name: inside[name] for name in COMPANIONS if name in inside}
    if isinstance(metadata.custom.get(TOKENIZER_TEXT), str):
        packed[TOKENIZER_TEXT] = metadata.custom[TOKENIZER_TEXT]
    return {name: _unpacked(name, value, where) for name, value in packed.items()}


def _unpacked(name: str, value: Any, where: Path) -> bytes:
    if isinstance(value, str):
        return value.encode()
    try:
        return base64.b64decode(value["base64"], validate=True)
    except (TypeError, KeyError, binascii.Error, ValueError) as error:
        raise TokenizerError(
            f"the embedded file {name!r} is malformed",
            where=where,
            expected="text, or base64 of bytes",
            remedy="embed the tokenizer again with apr-dist stamp --tokenizer",
        ) from error


def token_ids(metadata: AprMetadata) -> dict[str, int]:
    """Ids of the special tokens by their ``config.json`` key, as far as the metadata state them."""
    found = {key: metadata.custom.get(f"tokenizer.{key}") for key in _ROLES}
    return {key: value for key, value in found.items() if type(value) is int}


def end_token_ids(metadata: AprMetadata) -> tuple[int, ...]:
    """Ids of all tokens at which generation stops, the one that ends a text first."""
    one, several = token_ids(metadata).get("eos_token_id"), metadata.custom.get(END_IDS_KEY)
    listed = [value for value in several if type(value) is int] if isinstance(several, list) else []
    return tuple(dict.fromkeys([*([] if one is None else [one]), *listed]))


def stated_token_ids(metadata: AprMetadata) -> dict[str, Any]:
    """As ``token_ids``, in the form of a ``config.json``: several ends are a list."""
    ends = end_token_ids(metadata)
    return token_ids(metadata) | ({"eos_token_id": list(ends)} if len(ends) > 1 else {})
