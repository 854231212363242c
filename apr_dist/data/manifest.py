"""A data set's identity: what manifest.json records about a folder of shards, and reading it back.

Lives here: ``Shard``, ``TokenizerIdentity`` and ``Manifest``, opening a folder, and the fingerprint that
checkpoints carry. Hashing shard bytes and verifying live in ``verification``; making shards and repairing
live in ``corpus``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from apr_dist._rust_loader import ShardTable
from apr_dist.atomic_files import write_atomically
from apr_dist.data.manifest_file import (
    FLAGGED_SCHEMA,
    OLDER_SCHEMA,
    SCHEMA,
    Conversations,
    RecordedManifest,
    Shard,
    TokenizerIdentity,
    parse_manifest,
)
from apr_dist.data.shard_files import (
    FINGERPRINTS_SUFFIX,
    INDEX_SUFFIX,
    MANIFEST_NAME,
    check_shard_files,
    how_to_get_a_manifest,
    read_manifest_file,
    shards_of_older_folder,
)
from apr_dist.errors import DataError, ManifestError, ShardError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["MANIFEST_NAME", "Manifest", "Shard", "TokenizerIdentity"]

_NO_TOKENIZER = "unknown tokenizer"


@dataclass(frozen=True)
class Manifest:
    """What is known about one shard folder; built by ``load`` or by the encoder.

    Attributes:
        folder: the folder that holds the shards.
        shards: in reading order.
        vocab_size: ids are below this; None when an older folder does not say.
        tokenizer: whose ids these are; None in older folders.
        split: ``train``, ``validation``, or None when the folder is not a part of a split.
        total_documents: None in older folders that do not say.
        eos_policy: ``none``, ``between`` or ``after``; None when unknown.
        eos_token_id: the id written at document ends; None when unknown or with policy ``none``.
        has_index: a sidecar ``shard-NNNNN.idx`` of u64 document starts stands beside every shard.
        tokenizer_dir: where the tokenizer was when the shards were made (older readers want the key).
        source: what the documents were taken from, as the encoder described it.
        created_at: RFC 3339 time.
        tool_version: version of the writer.
        repaired_at: RFC 3339 time of the last repair, None when the encoder's own manifest stands.
        note: what a repair could not know.
        schema: the schema found in the file.
        conversations: how conversations were made into rows; None where words carry no flags.
        warnings: what cannot be checked about this folder, one sentence each.
    """

    folder: Path
    shards: tuple[Shard, ...]
    vocab_size: int | None
    tokenizer: TokenizerIdentity | None
    split: str | None = None
    total_documents: int | None = None
    eos_policy: str | None = None
    eos_token_id: int | None = None
    has_index: bool = False
    tokenizer_dir: str | None = None
    source: Mapping[str, object] = field(default_factory=dict)
    created_at: str | None = None
    tool_version: str | None = None
    repaired_at: str | None = None
    note: str | None = None
    schema: str = SCHEMA
    warnings: tuple[str, ...] = ()
    conversations: Conversations | None = None

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> tuple[Shard, ...]:
            """``shards``, made of the table that was read when it is first asked for."""
            table = vars(self).get("table")
            if name != "shards" or table is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            shards = tuple(Shard(*table.fields(index)) for index in range(len(table)))
            object.__setattr__(self, "shards", shards)
            return shards

    def __getstate__(self) -> dict[str, object]:
        """The fields without the table, which stays in its process."""
        return {**{key: value for key, value in vars(self).items() if key != "table"}, "shards": self.shards}

    @cached_property
    def table(self) -> ShardTable:
        """The shards as the Rust core keeps them."""
        listed = json.dumps({"shards": [vars(shard) for shard in self.shards]})
        table = ShardTable.parse(listed.encode())[1]
        assert table is not None
        return table

    @property
    def shard_count(self) -> int:
        """Number of shards."""
        return len(self.table)

    @property
    def longest_shard(self) -> int:
        """Tokens of the longest shard; 0 without shards."""
        return self.table.longest

    @property
    def total_tokens(self) -> int:
        """Tokens in all shards."""
        return self.table.total_tokens

    @property
    def flagged(self) -> bool:
        """Whether words carry flags: what is a target, and where conversations begin (`flags`)."""
        return self.conversations is not None

    def check_rows(self, seq_length: int) -> None:
        """Sequences of this length begin and end where rows of conversations do.

        Raises:
            DataError: they would cut conversations.
        """
        rows = self.conversations
        if rows is not None and seq_length % rows.seq_length:
            raise DataError(
                f"its rows hold {rows.seq_length:,} tokens and a sequence {seq_length:,}, which would cut"
                " conversations",
                where=self.folder,
                expected=f"a sequence length of {rows.seq_length}, or a multiple of it",
                remedy=f"train with --seq-length {rows.seq_length}, or encode again with `apr-dist tokenize"
                f" encode-chat --seq-length {seq_length}`",
                falsifier="FALSIFY-APR-DIST-LOADER-014",
            )

    def sequences(self, seq_length: int) -> int:
        """Sequences of ``seq_length`` predicted tokens in one pass; none crosses a shard's end."""
        return self.table.sequences(seq_length)

    @property
    def max_token_id(self) -> int | None:
        """The largest id in any shard, or None when a shard does not record it."""
        largest = [shard.max_id for shard in self.shards if shard.tokens]
        return None if None in largest else max((one for one in largest if one is not None), default=None)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex over the tokenizer's and the ordered shards' hashes: the data's identity.

        A folder without shard hashes is fingerprinted over names and sizes only; ``warnings`` says so.
        """
        identity = self.table.identity()
        if identity is not None:
            tokenizer = self.tokenizer.sha256 if self.tokenizer else _NO_TOKENIZER
            schema = FLAGGED_SCHEMA if self.flagged else SCHEMA
            return hashlib.sha256(f"{schema}\n{tokenizer}\n".encode() + identity).hexdigest()
        lines = ["names and sizes", *(f"{shard.file} {shard.bytes}" for shard in self.shards)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def path_of(self, shard: Shard) -> Path:
        """Where the shard's tokens lie."""
        return self.folder / shard.file

    def document_starts(self, shard: Shard) -> NDArray[np.uint64]:
        """First token of each document of ``shard``: [documents] u64, rising, beginning with 0.

        Raises:
            ShardError: the folder has no document index, or the sidecar is missing or of a wrong size.
        """
        if not self.has_index:
            raise ShardError(
                "this folder records no document boundaries",
                where=self.folder,
                remedy="encode the corpus again with `apr-dist tokenize encode-corpus`",
            )
        return self._sidecar(shard, INDEX_SUFFIX, "document index", shard.index_xxh3_64)

    @property
    def has_fingerprints(self) -> bool:
        """Every shard has a sidecar of its documents' fingerprints."""
        return all(shard.fingerprints_xxh3_64 is not None for shard in self.shards)

    def document_fingerprints(self, shard: Shard) -> NDArray[np.uint64]:
        """XXH3-64 of the text of each document of ``shard``, in order: [documents] u64.

        Raises:
            ShardError: the sidecar is missing, or is not the recorded one.
        """
        return self._sidecar(shard, FINGERPRINTS_SUFFIX, "list of fingerprints", shard.fingerprints_xxh3_64)

    def _sidecar(self, shard: Shard, suffix: str, name: str, digest: str | None) -> NDArray[np.uint64]:
        """A sidecar of one u64 a document, compared with the hash that was recorded."""
        import numpy as np  # noqa: PLC0415  (opening a manifest does not need numpy)
        import xxhash  # noqa: PLC0415

        path = self.path_of(shard).with_suffix(suffix)
        remedy = f"restore it, or apr-dist tokenize repair-manifest {self.folder}"
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ShardError(f"the {name} cannot be read ({error.strerror})", where=path) from error
        if len(content) % 8 or (shard.documents is not None and len(content) != 8 * shard.documents):
            expected = f"{8 * (shard.documents or 0)} ({shard.documents} documents)"
            raise ShardError(
                f"the {name} holds {len(content)} bytes", where=path, expected=expected, remedy=remedy
            )
        if digest is not None and xxhash.xxh3_64_hexdigest(content) != digest:
            raise ShardError(
                f"the {name} is not as it was recorded",
                where=path,
                expected=f"the hash {digest}",
                remedy=remedy,
            )
        return np.frombuffer(bytearray(content), dtype="<u8")

    @staticmethod
    def load(folder: Path, *, check_files: bool = True) -> Manifest:
        """Open a shard folder: read manifest.json and compare the files' sizes with it.

        Shard bytes are not hashed here (``verification.verify_dataset`` does that).

        Args:
            folder: the folder with manifest.json.
            check_files: False skips the look at every shard file (one system call a shard).

        Raises:
            ManifestError: no manifest, malformed, of an unknown schema, naming files outside the
                folder, without shards, or contradicting itself.
            ShardError: a shard is missing or its size is not the recorded one.
        """
        path = folder / MANIFEST_NAME
        content = read_manifest_file(folder)
        recorded, table = parse_manifest(content, where=path)
        if recorded.schema == OLDER_SCHEMA or not table:
            return _open_without_shard_facts(folder, recorded, listed=table is not None)
        manifest = _from_recorded(folder, recorded, table)
        _check_sums(manifest, recorded, path)
        if check_files and (table.has_broken_size() or table.first_misfit(folder) is not None):
            check_shard_files(folder, manifest.shards)
        return manifest

    def write(self) -> None:
        """Write manifest.json atomically; the older schema's keys are kept so that its readers work.

        Raises:
            OutputError: the folder cannot be written to.
        """
        head = self.to_json()
        shards = head.pop("shards")
        assert isinstance(shards, list)
        lines = ",\n".join(f"  {json.dumps(shard)}" for shard in shards)
        text = json.dumps(head, ensure_ascii=False, indent=1).removesuffix("\n}")
        write_atomically(self.folder / MANIFEST_NAME, f'{text},\n "shards": [\n{lines}\n ]\n}}\n'.encode())

    def to_json(self) -> dict[str, object]:
        """The manifest as the object that manifest.json holds."""
        recorded: dict[str, object] = {
            "schema": FLAGGED_SCHEMA if self.flagged else SCHEMA,
            "shard_count": self.shard_count,
            "total_tokens": self.total_tokens,
            "total_documents": self.total_documents,
            "vocab_size": self.vocab_size,
            "tokenizer": asdict(self.tokenizer) if self.tokenizer else None,
            "tokenizer_dir": self.tokenizer_dir,
            "dtype": "u32le",
            "split": self.split,
            "eos_policy": self.eos_policy,
            "eos_token_id": self.eos_token_id,
            "documents_index": {"suffix": INDEX_SUFFIX, "dtype": "u64le"} if self.has_index else None,
            "source": dict(self.source),
            "created_at": self.created_at,
            "tool_version": self.tool_version,
            "fingerprint": self.fingerprint,
        }
        if self.repaired_at is not None:
            recorded |= {"repair": True, "repaired_at": self.repaired_at, "note": self.note}
        if self.conversations is not None:
            recorded["conversations"] = asdict(self.conversations)
        left_out = set() if self.flagged else {"targets"}
        shards = [
            {key: one for key, one in vars(shard).items() if key not in left_out} for shard in self.shards
        ]
        return recorded | {"shards": shards}


def _from_recorded(folder: Path, recorded: RecordedManifest, table: ShardTable) -> Manifest:
    warnings = []
    if recorded.repair:
        warnings.append(f"this manifest was rebuilt from the shards; {recorded.note or 'no note was left'}")
    manifest = Manifest(
        folder=folder,
        shards=(),
        vocab_size=recorded.vocab_size,
        tokenizer=recorded.tokenizer,
        split=recorded.split,
        total_documents=recorded.total_documents,
        eos_policy=recorded.eos_policy,
        eos_token_id=recorded.eos_token_id,
        has_index=recorded.documents_index is not None,
        tokenizer_dir=recorded.tokenizer_dir,
        source=recorded.source_fields(),
        created_at=recorded.created_at,
        tool_version=recorded.tool_version,
        repaired_at=recorded.repaired_at,
        note=recorded.note,
        schema=recorded.schema,
        warnings=tuple(warnings),
        conversations=recorded.conversations,
    )
    vars(manifest)["table"] = table
    object.__delattr__(manifest, "shards")
    return manifest


def _check_sums(manifest: Manifest, recorded: RecordedManifest, path: Path) -> None:
    """The totals and the fingerprint must follow from the shard list: an edited manifest does not."""
    derived: dict[str, tuple[object, object]] = {
        "shard_count": (recorded.shard_count, manifest.shard_count),
        "total_tokens": (recorded.total_tokens, manifest.total_tokens),
        "fingerprint": (recorded.fingerprint, manifest.fingerprint),
    }
    for key, (found, expected) in derived.items():
        if found is not None and found != expected:
            raise ManifestError(
                f"{key} is {found}, which its own shard list contradicts",
                where=path,
                expected=str(expected),
                remedy=f"apr-dist tokenize repair-manifest {manifest.folder}",
            )


def _open_without_shard_facts(folder: Path, recorded: RecordedManifest, *, listed: bool) -> Manifest:
    """A folder whose manifest says nothing per shard: the files themselves are the list."""
    path = folder / MANIFEST_NAME
    if recorded.schema != OLDER_SCHEMA and listed:
        raise ManifestError(
            "it holds no shards",
            where=folder,
            expected="at least one shard",
            remedy=how_to_get_a_manifest(folder),
        )
    shards = shards_of_older_folder(folder)
    if not shards:
        raise ManifestError("it holds no shards", where=folder, expected="files named shard-*.bin")
    warnings = (
        f"schema {recorded.schema} records nothing per shard: content, id bounds and document "
        "boundaries cannot be checked, and the fingerprint covers only names and sizes",
    )
    manifest = Manifest(
        folder=folder,
        shards=shards,
        vocab_size=recorded.vocab_size,
        tokenizer=None,
        total_documents=recorded.total_documents,
        eos_policy=recorded.eos_policy,
        eos_token_id=recorded.eos_token_id,
        tokenizer_dir=recorded.tokenizer_dir,
        source=recorded.source_fields(),
        schema=recorded.schema,
        warnings=warnings,
    )
    _check_sums(manifest, recorded, path)
    return manifest
