"""The layout of manifest.json: its keys, their types and limits, and the errors of a malformed one.

Lives here: the records a manifest consists of and their validation. The shard list is read by the Rust core,
which keeps it as a table; what the keys mean for a folder of shards lives in ``manifest``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from apr_dist._rust_loader import ShardTable
from apr_dist.data.flags import VOCABULARY_LIMIT
from apr_dist.errors import ManifestError

SCHEMA = "apr-dist-shards-v1"
FLAGGED_SCHEMA = "apr-dist-shards-v2"
"""Shards whose words carry flags (`flags`); a reader that does not know them refuses this schema."""
OLDER_SCHEMA = "pretokenize-bin-v1"

_Count = Annotated[int, Field(ge=0)]
_TokenId = Annotated[int, Field(ge=0, lt=2**32)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


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
        fingerprints_xxh3_64: XXH3-64 of the sidecar of document fingerprints, None when there is none.
        targets: tokens of a flagged shard that are targets, None in a shard without flags.
    """

    file: str
    tokens: int
    bytes: int
    xxh3_64: str | None = None
    sha256: str | None = None
    min_id: int | None = None
    max_id: int | None = None
    documents: int | None = None
    index_xxh3_64: str | None = None
    fingerprints_xxh3_64: str | None = None
    targets: int | None = None


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
class Conversations:
    """How conversations were made into rows: what a manifest of flagged shards records beside the shards.

    Attributes:
        seq_length: tokens of a row; no conversation crosses from one row into the next.
        train_on: which tokens are targets, by the name of the rule.
        template: digest of the chat template and what it reads (`corpus.chat_template`).
        packing: ``best-fit``, or ``none`` with one conversation a row.
        too_long: what was done with conversations longer than a row: ``truncate``, ``drop`` or ``split``.
        pad_id: the id of padding.
        rows: how many.
        tokens: of conversations, without padding.
        targets: tokens that are targets.
        turn_end: the id of the special token that ends a turn of the assistant; None if there is none.
        turn_end_targets: how often that token is a target.
        lengths: tokens of a conversation, before anything was cut: least, quartiles and most.
        counts: conversations ``truncated``, ``dropped``, ``split``, ``without targets``, and so on.
    """

    seq_length: Annotated[int, Field(gt=0)]
    train_on: str
    template: str
    packing: str
    too_long: str
    pad_id: Annotated[int, Field(ge=0, lt=2**30)]
    rows: _Count
    tokens: _Count
    targets: _Count
    turn_end: _TokenId | None
    turn_end_targets: _Count
    lengths: Mapping[str, _Count]
    counts: Mapping[str, _Count]

    @property
    def fill(self) -> float:
        """Share of the rows' places that conversations fill."""
        return self.tokens / max(self.rows * self.seq_length, 1)


@dataclass(frozen=True)
class RecordedManifest:
    """The keys of manifest.json that are read, without the shards; others are ignored."""

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
    conversations: Conversations | None = None
    source: Mapping[str, object] | str | None = None
    created_at: str | None = None
    tool_version: str | None = None
    fingerprint: str | None = None
    repair: bool = False
    repaired_at: str | None = None
    note: str | None = None

    def source_fields(self) -> Mapping[str, object]:
        """The source as an object, whichever way it was recorded."""
        if self.source is None:
            return {}
        return {"kind": self.source} if isinstance(self.source, str) else dict(self.source)


@cache
def _validator() -> TypeAdapter[RecordedManifest]:
    return TypeAdapter(RecordedManifest)


def parse_manifest(content: bytes, *, where: Path) -> tuple[RecordedManifest, ShardTable | None]:
    """Read manifest.json's bytes: its keys, and its shards or None when it lists none.

    Raises:
        ManifestError: malformed JSON, an unknown schema, a key of a wrong type or out of bounds, a
            file name that is not plain, or one shard named twice.
    """
    try:
        head, table = ShardTable.parse(content)
        recorded = _validator().validate_json(head, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise _malformed(f"{place}: {first['msg']}" if place else first["msg"], where) from error
    except ValueError as error:
        raise _malformed(str(error), where) from error
    known = (SCHEMA, FLAGGED_SCHEMA, OLDER_SCHEMA)
    if recorded.schema not in known:
        raise ManifestError(
            f"its schema is {recorded.schema!r}",
            where=where,
            expected=" or ".join(known),
            remedy="read it with the version of apr-dist that wrote it, or a later one",
        )
    _check_flagged(recorded, where)
    if recorded.dtype != "u32le":
        raise ManifestError(f"its dtype is {recorded.dtype!r}", where=where, expected="u32le")
    if table and (name := table.listed_twice()):
        raise ManifestError(f"it names the shard {name} twice", where=where, expected="each shard once")
    return recorded, table


def _check_flagged(recorded: RecordedManifest, where: Path) -> None:
    """Flags and what they mean come together, and ids leave room for them."""
    if (recorded.schema == FLAGGED_SCHEMA) != (recorded.conversations is not None):
        raise ManifestError(
            f"its schema is {recorded.schema} and conversations are"
            f" {'described' if recorded.conversations else 'not described'}",
            where=where,
            expected=f"a description of conversations in schema {FLAGGED_SCHEMA} and in no other",
            remedy="encode the conversations again with `apr-dist tokenize encode-chat`",
        )
    limit = VOCABULARY_LIMIT
    if recorded.conversations and not 0 < (recorded.vocab_size or 0) <= limit:
        raise ManifestError(
            f"its vocabulary has {recorded.vocab_size} ids, and two bits of a word are flags",
            where=where,
            expected=f"a vocabulary of 1 to {limit:,} ids",
            remedy="encode the conversations again with `apr-dist tokenize encode-chat`",
        )


def _malformed(what: str, where: Path) -> ManifestError:
    return ManifestError(
        what,
        where=where,
        expected=f"a manifest of schema {SCHEMA}",
        remedy=f"apr-dist tokenize repair-manifest {where.parent}",
    )
