"""The layout of manifest.json: its keys, their types and limits, and the errors of a malformed one.

Lives here: the records a manifest consists of and their validation. What they mean for a folder of
shards lives in ``manifest``.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from apr_dist._rust_loader import ShardTable
from apr_dist.errors import ManifestError

SCHEMA = "apr-dist-shards-v1"
OLDER_SCHEMA = "pretokenize-bin-v1"

_Count = Annotated[int, Field(ge=0)]
_TokenId = Annotated[int, Field(ge=0, lt=2**32)]
_Xxh3 = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# Below it a tuple of shards costs nothing worth saving (256 KiB: about 900 shards).
_TABLE_BYTES = 1 << 18
_NOT_PLAIN = re.compile(r"[/\\\0]|^\.\.?$", re.MULTILINE)
_PlainName = Annotated[str, Field(min_length=1, max_length=255)]


@dataclass(frozen=True)
class Shard:
    """One file of token ids: headerless little-endian u32.

    Attributes:
        file: plain file name inside the folder.
        tokens: number of ids.
        bytes: size of the file, ``4 * tokens``.
        xxh3_64: XXH3-64 of the file in 16 hex digits (the quick check), None when unknown.
        sha256: SHA-256 of the file in hex (provenance), None when unknown.
        min_id: smallest id, None when unknown.
        max_id: largest id, None when unknown.
        documents: documents that begin in this shard, None when unknown.
        index_xxh3_64: XXH3-64 of the sidecar of document starts, None when there is none.
    """

    file: _PlainName
    tokens: _Count
    bytes: _Count
    xxh3_64: _Xxh3 | None = None
    sha256: _Sha256 | None = None
    min_id: _TokenId | None = None
    max_id: _TokenId | None = None
    documents: _Count | None = None
    index_xxh3_64: _Xxh3 | None = None


@dataclass(frozen=True)
class TokenizerIdentity:
    """Which tokenizer, in numbers: equal identities give equal ids.

    Attributes:
        sha256: of tokenizer.json, in hex.
        bpe_vocab_count: entries of the model's own vocabulary.
        added_tokens_count: added tokens that the model's vocabulary does not hold already.
        effective_vocab_count: the two together.
        merges_count: BPE merges.
        eos_id: the id that ends a document, None when the tokenizer has none.
        bos_id: the id that begins a sequence, None when undeclared.
        pad_id: the padding id, None when undeclared.
        id_bound: every id is below this (larger than the effective count when ids have gaps).
    """

    sha256: _Sha256
    bpe_vocab_count: _Count
    added_tokens_count: _Count
    effective_vocab_count: _Count
    merges_count: _Count
    eos_id: _TokenId | None = None
    bos_id: _TokenId | None = None
    pad_id: _TokenId | None = None
    id_bound: _Count = 0


@dataclass(frozen=True)
class RecordedManifest:
    """The keys of manifest.json that are read, of this schema and the older one; others are ignored."""

    schema: str
    shard_count: _Count | None = None
    total_tokens: _Count | None = None
    total_documents: _Count | None = None
    vocab_size: _Count | None = None
    tokenizer: TokenizerIdentity | None = None
    tokenizer_dir: str | None = None
    dtype: str = "u32le"
    split: str | None = None
    eos_policy: str | None = None
    eos_token_id: _TokenId | None = None
    documents_index: Mapping[str, str] | None = None
    source: Mapping[str, object] | str | None = None
    created_at: str | None = None
    tool_version: str | None = None
    fingerprint: str | None = None
    repair: bool = False
    repaired_at: str | None = None
    note: str | None = None
    shards: tuple[Shard, ...] | None = None

    def source_fields(self) -> Mapping[str, object]:
        """The source as an object, whichever way it was recorded."""
        if self.source is None:
            return {}
        return {"kind": self.source} if isinstance(self.source, str) else dict(self.source)


@cache
def _validator() -> TypeAdapter[RecordedManifest]:
    return TypeAdapter(RecordedManifest)


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """A hundred thousand new objects, none of them garbage, would be walked over again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def parse_table(content: bytes, *, where: Path) -> tuple[RecordedManifest, ShardTable] | None:
    """Read manifest.json's bytes where the shards are many and laid out as ``Manifest.write`` does.

    The record then holds no shards: they are in the table, checked as strictly. None when anything is
    otherwise, also when it is wrong: ``parse_manifest`` says what.
    """
    found = ShardTable.parse(content) if len(content) >= _TABLE_BYTES else None
    if found is None:
        return None
    head, table = found
    try:
        recorded = parse_manifest(content[:head] + b"]}", where=where)
    except ManifestError:
        return None
    return (recorded, table) if recorded.schema == SCHEMA and recorded.shards == () else None


def parse_manifest(content: bytes, *, where: Path) -> RecordedManifest:
    """Read manifest.json's bytes.

    Raises:
        ManifestError: malformed JSON, an unknown schema, a key of a wrong type or out of bounds, a
            file name that is not plain, or one shard named twice.
    """
    try:
        with _collector_at_rest():
            recorded = _validator().validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ManifestError(
            f"{place}: {first['msg']}" if place else first["msg"],
            where=where,
            expected=f"a manifest of schema {SCHEMA}",
            remedy=f"apr-dist tokenize repair-manifest {where.parent}",
        ) from error
    if recorded.schema not in (SCHEMA, OLDER_SCHEMA):
        raise ManifestError(
            f"its schema is {recorded.schema!r}", where=where, expected=f"{SCHEMA} or {OLDER_SCHEMA}"
        )
    if recorded.dtype != "u32le":
        raise ManifestError(f"its dtype is {recorded.dtype!r}", where=where, expected="u32le")
    _check_names(recorded.shards or (), where)
    return recorded


def _check_names(shards: tuple[Shard, ...], where: Path) -> None:
    names = [shard.file for shard in shards]
    if len(set(names)) == len(names) and not _NOT_PLAIN.search("\n".join(names)):
        return
    seen: set[str] = set()
    for name in names:
        if _NOT_PLAIN.search(name):
            raise ManifestError(
                f"it names the file {name!r}",
                where=where,
                expected="plain file names inside the folder, without separators or `..`",
            )
        if name in seen:
            raise ManifestError(f"it names the shard {name} twice", where=where, expected="each shard once")
        seen.add(name)
