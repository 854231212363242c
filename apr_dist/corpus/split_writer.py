"""Writing shards: ids and document starts appended, files finished, everything resumable.

Lives here: the temporary files of the shard being written, its hashes, and what must be remembered to go on
after a kill. When to commit, and which document goes where, is decided in ``encoding_run``.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from apr_dist.atomic_files import writing_to
from apr_dist.data.manifest_file import Shard
from apr_dist.data.shard_files import INDEX_SUFFIX

_FLUSH_TOKENS = 1 << 18
_READ_BYTES = 1 << 22
_PART = ".part"


@dataclass(frozen=True)
class OpenShard:
    """How far the shard being written is on disk: tokens and documents in its temporary files."""

    tokens: int
    documents: int


class SplitWriter:
    """Appends documents to ``shard-00000.bin``, ``shard-00001.bin``, ... of one folder.

    A document is never cut: a shard closes before the document that would come after its limit was
    reached, so it holds at least ``shard_tokens`` tokens and the last one may hold fewer.

    Attributes:
        folder: holds the shards.
        shards: the finished ones.
        tokens: in all shards, the open one included.
        documents: in all shards, the open one included.

    Args:
        folder: exists already.
        shard_tokens: tokens after which a shard takes no further document.
        closed: shards that an earlier run closed, in order.
        opened: what an earlier run had committed of the next shard.
    """

    def __init__(
        self,
        folder: Path,
        *,
        shard_tokens: int,
        closed: tuple[Shard, ...] = (),
        opened: OpenShard | None = None,
    ) -> None:
        self.folder = folder
        self.shards = list(closed)
        self.documents = sum(shard.documents or 0 for shard in closed)
        self.tokens = sum(shard.tokens for shard in closed)
        self._shard_tokens = shard_tokens
        self._open: _ShardWriter | None = None
        if opened is not None:
            self._open = _ShardWriter(folder, len(self.shards), opened)
            self.documents += opened.documents
            self.tokens += opened.tokens

    def append(self, ids: NDArray[np.uint32]) -> None:
        """Add one document: [tokens] u32, not empty."""
        if self._open is not None and self._open.tokens >= self._shard_tokens:
            self.close_shard()
        if self._open is None:
            self._open = _ShardWriter(self.folder, len(self.shards), OpenShard(tokens=0, documents=0))
        self._open.begin_document()
        self.documents += 1
        self.append_end(ids)

    def append_end(self, ids: NDArray[np.uint32]) -> None:
        """Add ids to the document that is there already (its end marker)."""
        assert self._open is not None, "an end marker follows a document"
        self._open.append(ids)
        self.tokens += ids.size

    def commit(self) -> OpenShard | None:
        """Make everything appended so far durable; None when no shard is open."""
        return None if self._open is None else self._open.commit()

    def close_shard(self) -> None:
        """Finish the open shard, if there is one."""
        if self._open is not None:
            self.shards.append(self._open.finish())
            self._open = None

    def abandon(self) -> None:
        """Close the temporary files and leave them as they are."""
        if self._open is not None:
            self._open.close_files()


class _ShardWriter:
    """One shard and its sidecar under temporary names until ``finish`` gives them their own."""

    def __init__(self, folder: Path, number: int, opened: OpenShard) -> None:
        self._names = (f"shard-{number:05}.bin", f"shard-{number:05}{INDEX_SUFFIX}")
        self._folder = folder
        self.tokens, self._documents = opened.tokens, opened.documents
        self._pending: list[NDArray[np.uint32]] = []
        self._pending_tokens = 0
        self._starts: list[int] = []
        self._quick, self._index_quick, self._full = xxhash.xxh3_64(), xxhash.xxh3_64(), hashlib.sha256()
        self._min_id, self._max_id = 2**32 - 1, 0
        ids_part, starts_part = self._parts = [folder / (name + _PART) for name in self._names]
        self._cut_to(4 * opened.tokens, 8 * opened.documents)
        with writing_to(folder):
            self._ids_file, self._starts_file = ids_part.open("ab"), starts_part.open("ab")

    def begin_document(self) -> None:
        """What is appended next begins a document."""
        self._starts.append(self.tokens)
        self._documents += 1

    def append(self, ids: NDArray[np.uint32]) -> None:
        """Add ids: [tokens] u32."""
        self.tokens += ids.size
        self._pending.append(ids)
        self._pending_tokens += ids.size
        if self._pending_tokens >= _FLUSH_TOKENS:
            self._write_pending()

    def commit(self) -> OpenShard:
        """Make everything appended so far durable."""
        self._write_pending()
        with writing_to(self._parts[0]):
            for file in (self._ids_file, self._starts_file):
                file.flush()
                os.fsync(file.fileno())
        return OpenShard(self.tokens, self._documents)

    def finish(self) -> Shard:
        """Give the files their final names and say everything about them."""
        self.commit()
        self.close_files()
        with writing_to(self._folder):
            for part, name in zip(self._parts, self._names, strict=True):
                part.replace(self._folder / name)
        return Shard(
            file=self._names[0],
            tokens=self.tokens,
            bytes=4 * self.tokens,
            xxh3_64=self._quick.hexdigest(),
            sha256=self._full.hexdigest(),
            min_id=self._min_id,
            max_id=self._max_id,
            documents=self._documents,
            index_xxh3_64=self._index_quick.hexdigest(),
        )

    def close_files(self) -> None:
        """Close the temporary files."""
        with writing_to(self._folder):
            self._ids_file.close()
            self._starts_file.close()

    def _write_pending(self) -> None:
        starts = np.array(self._starts, dtype="<u8").tobytes()
        self._index_quick.update(starts)
        with writing_to(self._folder):
            if self._pending:
                block = np.concatenate(self._pending).astype("<u4", copy=False)
                self._learn(block)
                self._ids_file.write(block.data)
            self._starts_file.write(starts)
        self._pending, self._pending_tokens, self._starts = [], 0, []

    def _learn(self, block: NDArray[np.uint32]) -> None:
        self._quick.update(block.data)
        self._full.update(block.data)
        self._min_id = min(self._min_id, int(block.min()))
        self._max_id = max(self._max_id, int(block.max()))

    def _cut_to(self, ids_bytes: int, starts_bytes: int) -> None:
        """Cut what an earlier run left to what it had committed, and hash that again."""
        for part, name, size in zip(self._parts, self._names, (ids_bytes, starts_bytes), strict=True):
            with writing_to(part):
                if size and not part.exists():  # killed between finishing this shard and committing that
                    (self._folder / name).replace(part)
                with part.open("ab"):
                    os.truncate(part, size)
        with self._parts[0].open("rb") as file:
            while block := file.read(_READ_BYTES):
                self._learn(np.frombuffer(block, dtype="<u4"))
        self._index_quick.update(self._parts[1].read_bytes())
