"""Writing shards: ids, document starts and fingerprints appended, files finished, everything resumable.

Lives here: the temporary files of the shard being written, its hashes, and what must be remembered to go on
after a kill. When to commit, and which document goes where, is decided in ``encoding_run``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from apr_dist.atomic_files import writing_to
from apr_dist.data.flags import are_targets, ids_of
from apr_dist.data.manifest_file import Shard
from apr_dist.data.shard_files import FINGERPRINTS_SUFFIX, INDEX_SUFFIX

_FLUSH_TOKENS = 1 << 18
_READ_BYTES = 1 << 22
_PART = ".part"


@dataclass(frozen=True)
class OpenShard:
    """How far the shard being written is on disk.

    Attributes:
        tokens: in its temporary file.
        documents: whose starts and fingerprints are in theirs.
        hashes: XXH3-64 of the three files so far: ids, starts, fingerprints.
    """

    tokens: int
    documents: int
    hashes: tuple[str, ...] = ()


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
        flagged: words carry flags beside the ids (`data.flags`).
    """

    def __init__(
        self,
        folder: Path,
        *,
        shard_tokens: int,
        closed: tuple[Shard, ...] = (),
        opened: OpenShard | None = None,
        flagged: bool = False,
    ) -> None:
        self.folder, self._flagged = folder, flagged
        self.shards = list(closed)
        self.documents = sum(shard.documents or 0 for shard in closed)
        self.tokens = sum(shard.tokens for shard in closed)
        self._shard_tokens = shard_tokens
        self._open: _ShardWriter | None = None
        if opened is not None:
            self._open = _ShardWriter(folder, len(self.shards), opened, flagged=flagged)
            self.documents += opened.documents
            self.tokens += opened.tokens

    def append(self, ids: NDArray[np.uint32], fingerprint: int) -> None:
        """Add one document: [tokens] u32, not empty, and the 64-bit hash of its text."""
        if self._open is not None and self._open.tokens >= self._shard_tokens:
            self.close_shard()
        if self._open is None:
            beginning = OpenShard(tokens=0, documents=0)
            self._open = _ShardWriter(self.folder, len(self.shards), beginning, flagged=self._flagged)
        self._open.begin_document(fingerprint)
        self.documents += 1
        self.append_end(ids)

    def append_end(self, ids: NDArray[np.uint32]) -> None:
        """Add ids to the document that is there already: its end marker, or padding."""
        assert self._open is not None, "what ends a document follows one"
        self._open.append(ids)
        self.tokens += ids.size

    @property
    def open_tokens(self) -> int:
        """Tokens of the shard that is being written."""
        return 0 if self._open is None else self._open.tokens

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


def is_closed_intact(folder: Path, shard: Shard) -> bool:
    """Whether the files of a finished shard hold what was recorded when it was closed."""
    documents = 8 * (shard.documents or 0)
    facts = zip(
        _names(int(shard.file[6:-4])),
        (shard.bytes, documents, documents),
        (shard.xxh3_64, shard.index_xxh3_64, shard.fingerprints_xxh3_64),
        strict=True,
    )
    return all(_hash_of(folder / name, size) == digest for name, size, digest in facts)


def is_open_intact(folder: Path, number: int, opened: OpenShard) -> bool:
    """Whether the files of shard ``number`` begin with what was acknowledged of it."""
    sizes = (4 * opened.tokens, 8 * opened.documents, 8 * opened.documents)
    return all(
        digest == (_hash_of(folder / (name + _PART), size) or _hash_of(folder / name, size))
        for name, size, digest in zip(_names(number), sizes, opened.hashes, strict=True)
    )


def _names(number: int) -> tuple[str, str, str]:
    stem = f"shard-{number:05}"
    return f"{stem}.bin", stem + INDEX_SUFFIX, stem + FINGERPRINTS_SUFFIX


def _hash_of(path: Path, size: int) -> str | None:
    """XXH3-64 of the first ``size`` bytes; None where there are fewer."""
    digest, left = xxhash.xxh3_64(), size
    try:
        with path.open("rb") as file:
            while left and (block := file.read(min(left, _READ_BYTES))):
                digest.update(block)
                left -= len(block)
    except OSError:
        return None
    return None if left else digest.hexdigest()


class _ShardWriter:
    """One shard and its sidecars under temporary names until ``finish`` gives them their own."""

    def __init__(self, folder: Path, number: int, opened: OpenShard, *, flagged: bool) -> None:
        self._names = _names(number)
        self._folder = folder
        self.tokens, self._documents = opened.tokens, opened.documents
        self._pending: list[NDArray[np.uint32]] = []
        self._pending_tokens = 0
        self._starts: list[int] = []
        self._fingerprints: list[int] = []
        self._hashes = [xxhash.xxh3_64() for _ in self._names]
        self._full = hashlib.sha256()
        self._min_id, self._max_id, self._targets = 2**32 - 1, 0, 0
        self._flagged = flagged
        self._parts = [folder / (name + _PART) for name in self._names]
        self._cut_to((4 * opened.tokens, 8 * opened.documents, 8 * opened.documents))
        with writing_to(folder):
            self._files = [part.open("ab") for part in self._parts]

    def begin_document(self, fingerprint: int) -> None:
        """What is appended next begins a document."""
        self._starts.append(self.tokens)
        self._fingerprints.append(fingerprint)
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
            for file in self._files:
                file.flush()
                os.fsync(file.fileno())
        return OpenShard(self.tokens, self._documents, tuple(one.hexdigest() for one in self._hashes))

    def finish(self) -> Shard:
        """Give the files their final names and say everything about them."""
        self.commit()
        self.close_files()
        with writing_to(self._folder):
            for part, name in zip(self._parts, self._names, strict=True):
                part.replace(self._folder / name)
        quick, index, fingerprints = (one.hexdigest() for one in self._hashes)
        return Shard(
            file=self._names[0],
            tokens=self.tokens,
            bytes=4 * self.tokens,
            xxh3_64=quick,
            sha256=self._full.hexdigest(),
            min_id=self._min_id,
            max_id=self._max_id,
            documents=self._documents,
            index_xxh3_64=index,
            fingerprints_xxh3_64=fingerprints,
            targets=self._targets if self._flagged else None,
        )

    def close_files(self) -> None:
        """Close the temporary files."""
        with writing_to(self._folder):
            for file in self._files:
                file.close()

    def _write_pending(self) -> None:
        sidecars = [np.array(one, dtype="<u8").tobytes() for one in (self._starts, self._fingerprints)]
        with writing_to(self._folder):
            if self._pending:
                block = np.concatenate(self._pending).astype("<u4", copy=False)
                self._learn(block)
                self._files[0].write(block.data)
            for content, digest, file in zip(sidecars, self._hashes[1:], self._files[1:], strict=True):
                digest.update(content)
                file.write(content)
        self._pending, self._pending_tokens = [], 0
        self._starts, self._fingerprints = [], []

    def _learn(self, block: NDArray[np.uint32]) -> None:
        self._hashes[0].update(block.data)
        self._full.update(block.data)
        if self._flagged:
            self._targets += int(np.count_nonzero(are_targets(block)))
            block = ids_of(block)
        self._min_id = min(self._min_id, int(block.min()))
        self._max_id = max(self._max_id, int(block.max()))

    def _cut_to(self, sizes: Sequence[int]) -> None:
        """Cut what an earlier run left to what it had committed, and hash that again."""
        for part, name, size in zip(self._parts, self._names, sizes, strict=True):
            with writing_to(part):
                if size and not part.exists():  # killed between finishing this shard and committing that
                    (self._folder / name).replace(part)
                with part.open("ab"):
                    os.truncate(part, size)
        with self._parts[0].open("rb") as file:
            while block := file.read(_READ_BYTES):
                self._learn(np.frombuffer(block, dtype="<u4"))
        for part, digest in zip(self._parts[1:], self._hashes[1:], strict=True):
            digest.update(part.read_bytes())
