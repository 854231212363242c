"""Training batches of token ids from memory-mapped shards.

Global batch number k is a pure function of (seed, data, sequence length, batch size, shuffle, k):
ranks and micro-batches only cut it. So the state is a handful of integers, and resuming anywhere, on
any number of processes, is arithmetic. Reading, order and copying are done by ``_rust_loader``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import get_worker_info
from torch.utils.dlpack import from_dlpack

from apr_dist.choices import ShardAccess, VerifyShards
from apr_dist.data.descriptors import open_limit
from apr_dist.data.documents import Documents, DocumentStarts, document_begins
from apr_dist.data.evaluation_loader import EvaluationLoader
from apr_dist.data.mixture import CYCLE_BATCHES, Mixture, Progress, Source
from apr_dist.data.prefetch import BufferKind, Course, RunAhead, default_depth, process
from apr_dist.data.token_stream import (
    ShardStream,
    Shuffle,
    check_order,
    check_pinning,
    check_seed,
    choice,
    share_of,
)
from apr_dist.data.training_set import cycle_units
from apr_dist.errors import DataError, StreamExhausted, UsageError

if TYPE_CHECKING:
    from apr_dist._rust_loader import TokenStream
    from apr_dist.data.manifest import Manifest

__all__ = ["EvaluationLoader", "Mixture", "Progress", "Shuffle", "Source", "TokenLoader"]

STATE_VERSION = 1


class TokenLoader:
    """This rank's share of every global batch, for as many epochs as are wanted.

    Each sequence occurs exactly once an epoch; the stream runs on over the end of an epoch inside a
    batch, so nothing is dropped there and every rank has the same number of batches.

    Args:
        dataset: the shards, or a ``Mixture`` of several data sets.
        seq_length: tokens predicted per sequence; a row holds one more.
        global_batch: sequences per optimizer step, over all ranks.
        micro_batch: sequences per tensor.
        rank: this process.
        world_size: processes that share a global batch.
        seed: of the order.
        shuffle: the order, see ``Shuffle``.
        block_sequences: sequences of a block with ``Shuffle.BLOCK``; part of the order, like the seed.
        max_epochs: passes over the data (of a mixture: over any source) before ``StreamExhausted``; None:
            no limit.
        verify: when shard hashes are checked.
        access: how shards are read.
        max_open_shards: shards kept open at once; None: as many as the limit on open files allows, which is
            raised as far as it may be. Views keep theirs beyond that.
        recheck_s: an open shard not looked at for this long is compared with its file again.
        prefetch_batches: global batches made ahead by a thread once batches are taken in order; 0: none;
            None: by their size, two to eight, or many views.
        pin_memory: gather into page-locked memory; None: where a CUDA device is. Views are never pinned.
        origin: (global batch, position) that batches are counted from, where an earlier part of the run
            had another batch size.
        dtype: of gathered batches: int32, or int64 for a consumer on the CPU that indexes with nothing
            else. Send int32 to a device and widen there.

    Raises:
        UsageError: the batch does not divide into ranks and micro-batches, a number is impossible, or too
            few files may be opened.
        ManifestError: the data set has no shards.
        DataError: no shard holds a whole sequence.
        ShardError: with ``VerifyShards.OPEN``, a shard is not what the manifest says.
    """

    def __init__(
        self,
        dataset: Manifest | Mixture,
        *,
        seq_length: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int,
        shuffle: Shuffle | str = Shuffle.SEQUENCE,
        block_sequences: int = 8,
        max_epochs: int | None = None,
        verify: VerifyShards | str = VerifyShards.FIRST_TOUCH,
        access: ShardAccess | str = ShardAccess.MMAP,
        max_open_shards: int | None = None,
        recheck_s: float = 1.0,
        prefetch_batches: int | None = None,
        pin_memory: bool | None = None,
        origin: tuple[int, int] = (0, 0),
        dtype: torch.dtype = torch.int32,
    ) -> None:
        self.shuffle = choice(Shuffle, shuffle, "shuffle")
        self._dataset, self._seq_length, self._seed = dataset, seq_length, seed
        self._batch_size, self._micro, self._rank = global_batch, micro_batch, rank
        self._share = share_of(global_batch, micro_batch, rank, world_size)
        self._origin = origin
        self._block = block_sequences if self.shuffle is Shuffle.BLOCK else 1
        check_seed(seed)
        check_order(
            self.shuffle, block_sequences, micro_batch, mixed=isinstance(dataset, Mixture), dtype=dtype
        )
        if max_epochs is not None and max_epochs < 1:
            raise UsageError(f"max_epochs is {max_epochs}", expected="at least 1, or none for no limit")
        check_pinning(pin_memory)
        self._max_epochs = max_epochs
        self._global_batch = origin[0]
        self._options: dict[str, Any] = {
            "seq_length": seq_length,
            "shuffle": self.shuffle.value,
            "seed": seed,
            "block": self._block,
            "verify": choice(VerifyShards, verify, "verify").value,
            "access": choice(ShardAccess, access, "access").value,
            "recheck_s": recheck_s,
            "wide": dtype == torch.int64,
        }
        self._views = self.shuffle is Shuffle.BLOCK and self._options["access"] == ShardAccess.MMAP.value
        depth = default_depth(self._share, seq_length + 1, views=self._views)
        self._depth = depth if prefetch_batches is None else prefetch_batches
        in_views = (self._depth + 2) * (self._share // micro_batch) if self._views else 0
        parts = [one.dataset for one in dataset.sources] if isinstance(dataset, Mixture) else [dataset]
        shards = sum(part.shard_count for part in parts)
        self._options["max_open"] = open_limit(shards, max_open_shards, in_views=min(shards, in_views))
        self._stream = ShardStream(dataset, self._options, cycle=cycle_units(global_batch, self._block))
        self._batches = self._count_batches()
        self._pin_memory, self._dtype = pin_memory, dtype
        self._ahead: RunAhead | None = None
        self._starts = DocumentStarts()
        self._latest = -1

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences in one pass over the data; of a mixture: over each source once."""
        return self._stream.sequences()

    @property
    def dropped_tokens(self) -> int:
        """Tokens that no sequence holds: what is left over at the ends of shards."""
        return self._stream.open().dropped_tokens

    @property
    def position(self) -> int:
        """Sequences handed out so far, over all ranks."""
        return self._position(self._global_batch)

    @property
    def epoch(self) -> int:
        """Whole passes over the data done so far; of a mixture: over the source with most of them."""
        return max(progress.epoch for progress in self.progress().values())

    def progress(self, batches: int | None = None) -> dict[str, Progress]:
        """How far each source of a mixture has come, by name; a single data set is named by its folder.

        Args:
            batches: global batches handed out; None: as many as the state says.
        """
        position = self.position if batches is None else self._position(batches)
        found = self._stream.open().progress(position)
        sources = self._dataset.sources if isinstance(self._dataset, Mixture) else ()
        names = [source.name for source in sources] or [self._dataset.folder.name]
        sizes = [self._stream.open().sequences(source) for source in range(len(names))]
        return {
            name: Progress(done, epoch, max(0, done - 1) // size)
            for name, (done, epoch), size in zip(names, found, sizes, strict=True)
        }

    def batch(self, k: int) -> list[torch.Tensor]:
        """This rank's micro-batches of global batch ``k``, each int32 [micro_batch, seq_length + 1].

        With ``Shuffle.BLOCK`` each is a view of the mapped shard: do not write to it, and do not
        truncate the file under it. Batches taken in order are made ahead of time.

        Raises:
            StreamExhausted: batch ``k`` needs more epochs than allowed.
            ShardError: a shard is missing, of another size or content, or changed while in use.
        """
        ahead, tensors = self._ahead, None
        if ahead is not None and ahead.k == k and ahead.process == process.number:
            try:
                tensors = ahead.next()
            except BaseException:
                self._ahead = None
                raise
        if tensors is None:
            first, stream = self._first(k), self._stream.open()
            tensors = self._made_now(first, stream)
            if k == self._latest + 1 and k > 0:
                self._run_ahead(k + 1, stream)
        self._latest = k
        if self._views or self._micro == self._share:
            return tensors
        return list(torch.split(tensors[0], self._micro))

    @property
    def flagged(self) -> bool:
        """Whether words of batches carry flags (`flags`): any source holds conversations."""
        return any(source.flagged for source, _, _ in self._stream.sources)

    def documents(self, k: int, *, plain: bool = True) -> list[Documents]:
        """Where documents begin in the inputs of each of this rank's micro-batches of global batch ``k``.

        Conversations by their flags, which cost nothing where the batch was made ahead; documents of plain
        text from the data set's index where it has one, else from its end-of-document id.

        Args:
            k: number of the global batch.
            plain: whether documents of plain text count; else only conversations do.

        Raises:
            DataError: the data set records neither.
            StreamExhausted, ShardError: as ``batch``.
        """
        if not plain or all(source.flagged for source, _, _ in self._stream.sources):
            return self._conversations(k)
        first, stream = self._first(k), self._stream.open()
        places = [(*self._stream.shard(shard), start) for shard, start in stream.locate(first, self._share)]

        def rows() -> torch.Tensor:
            gathered: torch.Tensor = from_dlpack(stream.gather(first, self._share))
            return gathered

        begins = document_begins(rows, places, self._seq_length, self._starts)
        return [Documents.from_begins(part) for part in torch.split(begins, self._micro)]

    def _conversations(self, k: int) -> list[Documents]:
        ahead = self._ahead
        if ahead is not None and ahead.made == k and ahead.process == process.number:
            return Documents(ahead.edges(), (self._share, self._seq_length)).split(self._micro)
        gathered: torch.Tensor = from_dlpack(self._stream.open().gather(self._first(k), self._share))
        return Documents.of_flagged(gathered).split(self._micro)

    def rows(self, k: int) -> list[torch.Tensor]:
        """This rank's sequences of global batch ``k`` as views of the maps, each int32 [seq_length + 1].

        Raises:
            UsageError: shards are read with ``ShardAccess.PREAD``, which maps nothing.
            StreamExhausted, ShardError: as ``batch``.
        """
        if self._options["access"] != ShardAccess.MMAP.value:
            raise UsageError("rows that are read with access=pread cannot be viewed", expected="access=mmap")
        views = self._stream.open().views(self._first(k), self._share)
        return [from_dlpack(view) for view in views]

    def next_batch(self) -> list[torch.Tensor]:
        """The micro-batches of the next global batch; the state moves on when they are complete."""
        batch = self.batch(self._global_batch)
        self._global_batch += 1
        return batch

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        """Global batches from the current state on, until the epochs allowed are used up."""
        while True:
            try:
                yield self.next_batch()
            except StreamExhausted:
                return

    def state(self) -> dict[str, int | str]:
        """Where the stream stands, as plain fields: valid for every rank, world size and micro-batch."""
        return {
            "version": STATE_VERSION,
            "global_batch": self._global_batch,
            "seed": self._seed,
            "fingerprint": self.fingerprint,
            "seq_length": self._seq_length,
            "batch_size": self._batch_size,
            "shuffle": self.shuffle.value,
            "block_sequences": self._block,
        }

    def load_state(self, state: Mapping[str, object]) -> None:
        """Go to where ``state`` was taken.

        Raises:
            DataError: the state was taken with other data or another order, named with both values, or
                is not one of this loader.
        """
        found = state.get("global_batch")
        if state.get("version") != STATE_VERSION or not isinstance(found, int) or found < 0:
            raise DataError(
                f"the loader state has version {state.get('version')} and global_batch {found}",
                expected=f"version {STATE_VERSION} and a count",
            )
        for key, value in self.state().items():
            if key != "global_batch" and state.get(key) != value:
                raise _other_order(key, state.get(key), value, self._dataset)
        self._global_batch = found

    def stats(self) -> dict[str, int | float]:
        """What was read so far, in this process, and how long batches took to hand over.

        ``bytes``; ``shards_opened``, ``shards_verified``, ``shards_open``; ``batches``; ``waits`` (batches
        that were not ready); ``next_p50_us``, ``next_p99_us``, ``next_p999_us`` (upper edges of buckets 19 %
        wide); ``minor_faults``, ``major_faults`` of the prefetch thread, while there is one.
        """
        stats = dict(self._stream.open().stats())
        faults = self._ahead.faults() if self._ahead else None
        if faults:
            stats["minor_faults"], stats["major_faults"] = faults
        return stats

    def close(self) -> None:
        """Let go of the shards; tensors that were handed out stay good. Using the loader reopens it."""
        self._stop_ahead()
        self._stream.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": None, "_latest": -1, "_starts": DocumentStarts()}

    def _made_now(self, first: int, stream: TokenStream) -> list[torch.Tensor]:
        if self._views:
            return [from_dlpack(view) for view in stream.views(first, self._share, self._micro)]
        return [from_dlpack(stream.gather(first, self._share))]

    def _run_ahead(self, k: int, stream: TokenStream) -> None:
        """Let a thread make the batches from ``k`` on; not in a worker process of a DataLoader."""
        self._stop_ahead()
        left = None if self._batches is None else self._batches - k
        if self._depth < 1 or left == 0 or get_worker_info() is not None:
            return
        course = Course(
            first=self._first(k),
            share=self._share,
            stride=self._batch_size,
            batches=left,
            rows_per_view=self._micro if self._views else None,
            depth=self._depth,
            flagged=self.flagged,
        )
        pinned = torch.cuda.is_available() if self._pin_memory is None else self._pin_memory
        kind = BufferKind(width=self._seq_length + 1, dtype=self._dtype, pinned=pinned)
        self._ahead = RunAhead(stream, course, kind, k=k)

    def _stop_ahead(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.process == process.number:
            ahead.close()

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the training data; computed at first use, since it reads every shard's entry."""
        return self._dataset.fingerprint

    def _count_batches(self) -> int | None:
        """Global batches there are; None: no end."""
        epochs = 1 if self.shuffle is Shuffle.NONE else self._max_epochs
        if epochs is None:
            return None
        stream = self._stream.open()
        sizes = [stream.sequences(source) for source in range(len(self._stream.sources))]
        if len(sizes) == 1:
            return self._origin[0] + (epochs * sizes[0] - self._origin[1]) // self._batch_size

        def passes_an_end(k: int) -> bool:
            progress = stream.progress(self._position(k + 1))
            return any(done > epochs * size for (done, _), size in zip(progress, sizes, strict=True))

        # No source is left out of a cycle, so the shortest ends before this many batches.
        bound = (epochs * min(sizes) + 1) * CYCLE_BATCHES
        return bisect_left(range(bound), True, key=passes_an_end)

    def _first(self, k: int) -> int:
        """Position of this rank's first sequence of global batch ``k``."""
        if k < self._origin[0]:
            raise UsageError(
                f"global batch {k} was asked for", expected=f"a number of at least {self._origin[0]}"
            )
        if self._batches is not None and k >= self._batches:
            epochs = 1 if self.shuffle is Shuffle.NONE else self._max_epochs
            raise StreamExhausted(
                f"global batch {k} needs sequences behind the end of epoch {epochs}",
                where=self._dataset.folder,
                expected=f"at most {self._batches} global batches of {self._batch_size}, from "
                f"{self.sequences_per_epoch} sequences an epoch",
                remedy="add data, allow more epochs, or train fewer steps",
                falsifier="FALSIFY-APR-DIST-LOADER-009",
            )
        return self._position(k) + self._rank * self._share

    def _position(self, k: int) -> int:
        """Sequences of the stream before global batch ``k``."""
        return self._origin[1] + (k - self._origin[0]) * self._batch_size


def _other_order(key: str, found: object, expected: object, dataset: Manifest | Mixture) -> DataError:
    what = "other data" if key == "fingerprint" else f"another {key}"
    return DataError(
        f"the loader state was taken with {what}: {found}",
        where=dataset.folder,
        expected=str(expected),
        remedy="resume with the data and order the run began with, or start a new run from its checkpoint",
        falsifier="FALSIFY-APR-DIST-LOADER-004",
    )
