"""Training batches of token ids from memory-mapped shards.

Global batch number k is a pure function of (seed, data, sequence length, batch size, shuffle, k):
ranks and micro-batches only cut it. So the state is a handful of integers, and resuming anywhere, on
any number of processes, is arithmetic. Reading, order and copying are done by ``_rust_loader``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.dlpack import from_dlpack

from apr_dist.data.evaluation_loader import EvaluationLoader
from apr_dist.data.token_stream import Access, ShardStream, Shuffle, Verify, check_seed, choice, share_of
from apr_dist.errors import DataError, StreamExhausted, UsageError

if TYPE_CHECKING:
    from apr_dist.data.manifest import Manifest

__all__ = ["Access", "EvaluationLoader", "Shuffle", "TokenLoader", "Verify"]

STATE_VERSION = 1


class TokenLoader:
    """This rank's share of every global batch, for as many epochs as are wanted.

    Each sequence occurs exactly once an epoch; the stream runs on over the end of an epoch inside a
    batch, so nothing is dropped there and every rank has the same number of batches.

    Args:
        dataset: the shards.
        seq_length: tokens predicted per sequence; a row holds one more.
        global_batch: sequences per optimizer step, over all ranks.
        micro_batch: sequences per tensor.
        rank: this process.
        world_size: processes that share a global batch.
        seed: of the order.
        shuffle: the order, see ``Shuffle``.
        block_sequences: sequences of a block with ``Shuffle.BLOCK``; part of the order, like the seed.
        max_epochs: passes over the data before ``StreamExhausted``; None: no limit.
        verify: when shard hashes are checked.
        access: how shards are read.
        max_open_shards: shards kept open at once.

    Raises:
        UsageError: the batch does not divide into ranks and micro-batches, or a number is impossible.
        ManifestError: the data set has no shards.
        DataError: no shard holds a whole sequence.
        ShardError: with ``Verify.OPEN``, a shard is not what the manifest says.
    """

    def __init__(
        self,
        dataset: Manifest,
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
        verify: Verify | str = Verify.FIRST_TOUCH,
        access: Access | str = Access.MMAP,
        max_open_shards: int = 256,
    ) -> None:
        self.shuffle = choice(Shuffle, shuffle, "shuffle")
        self._dataset, self._seq_length, self._seed = dataset, seq_length, seed
        self._batch_size, self._micro, self._rank = global_batch, micro_batch, rank
        self._share = share_of(global_batch, micro_batch, rank, world_size)
        self._block = block_sequences if self.shuffle is Shuffle.BLOCK else 1
        cuts = self.shuffle is not Shuffle.BLOCK or self._block % micro_batch == 0
        if self._block < 1 or not cuts:
            raise UsageError(
                f"micro_batch {micro_batch} does not divide block_sequences {block_sequences}",
                expected="blocks that are cut into whole micro-batches",
                remedy="choose a multiple of the micro-batch, or shuffle=sequence",
            )
        if max_epochs is not None and max_epochs < 1:
            raise UsageError(f"max_epochs is {max_epochs}", expected="at least 1, or none for no limit")
        check_seed(seed)
        self._max_epochs = max_epochs
        self._global_batch = 0
        self._options: dict[str, Any] = {
            "seq_length": seq_length,
            "shuffle": self.shuffle.value,
            "seed": seed,
            "block": self._block,
            "verify": choice(Verify, verify, "verify").value,
            "access": choice(Access, access, "access").value,
            "max_open": max_open_shards,
        }
        self._fingerprint = dataset.fingerprint
        self._stream = ShardStream(dataset, self._options)

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences in one pass over the data."""
        return self._stream.open().sequences(0)

    @property
    def dropped_tokens(self) -> int:
        """Tokens that no sequence holds: what is left over at the ends of shards."""
        return self._stream.open().dropped_tokens

    @property
    def position(self) -> int:
        """Sequences handed out so far, over all ranks."""
        return self._global_batch * self._batch_size

    @property
    def epoch(self) -> int:
        """Whole passes over the data done so far."""
        return self.position // self.sequences_per_epoch

    def batch(self, k: int) -> list[torch.Tensor]:
        """This rank's micro-batches of global batch ``k``, each int32 [micro_batch, seq_length + 1].

        With ``Shuffle.BLOCK`` each is a view of the mapped shard: do not write to it, and do not
        truncate the file under it.

        Raises:
            StreamExhausted: batch ``k`` needs more epochs than allowed.
            ShardError: a shard is missing, of another size or content, or changed while in use.
        """
        first, stream = self._first(k), self._stream.open()
        if self.shuffle is Shuffle.BLOCK and self._options["access"] == Access.MMAP.value:
            return [from_dlpack(view) for view in stream.views(first, self._share, self._micro)]
        gathered: torch.Tensor = from_dlpack(stream.gather(first, self._share))
        return list(torch.split(gathered, self._micro))

    def rows(self, k: int) -> list[torch.Tensor]:
        """This rank's sequences of global batch ``k`` as views of the maps, each int32 [seq_length + 1].

        Raises:
            UsageError: shards are read with ``Access.PREAD``, which maps nothing.
            StreamExhausted, ShardError: as ``batch``.
        """
        if self._options["access"] != Access.MMAP.value:
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
            "fingerprint": self._fingerprint,
            **self._order_facts(),
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
        expected = {**self.state(), "global_batch": found}
        for key, value in expected.items():
            if state.get(key) != value:
                raise _other_order(key, state.get(key), value, self._dataset)
        self._global_batch = found

    def stats(self) -> dict[str, int | float]:
        """What was read so far: ``bytes``, ``shards_opened``, ``shards_verified``, ``shards_open``."""
        return dict(self._stream.open().stats())

    def close(self) -> None:
        """Let go of the shards; tensors that were handed out stay good. Using the loader reopens it."""
        self._stream.close()

    def _order_facts(self) -> dict[str, int | str]:
        return {
            "seq_length": self._seq_length,
            "batch_size": self._batch_size,
            "shuffle": self.shuffle.value,
            "block_sequences": self._block,
        }

    def _first(self, k: int) -> int:
        """Position of this rank's first sequence of global batch ``k``."""
        if k < 0:
            raise UsageError(f"global batch {k} was asked for", expected="a number from 0 on")
        epochs = 1 if self.shuffle is Shuffle.NONE else self._max_epochs
        if epochs is not None and (k + 1) * self._batch_size > epochs * self.sequences_per_epoch:
            raise StreamExhausted(
                f"global batch {k} needs sequences behind the end of epoch {epochs}",
                where=self._dataset.folder,
                expected=f"at most {epochs * self.sequences_per_epoch // self._batch_size} global batches of "
                f"{self._batch_size} from {self.sequences_per_epoch} sequences in {epochs} epochs",
                remedy="add data, allow more epochs, or train fewer steps",
                falsifier="FALSIFY-APR-DIST-LOADER-009",
            )
        return k * self._batch_size + self._rank * self._share


def _other_order(key: str, found: object, expected: object, dataset: Manifest) -> DataError:
    what = "other data" if key == "fingerprint" else f"another {key}"
    return DataError(
        f"the loader state was taken with {what}: {found}",
        where=dataset.folder,
        expected=str(expected),
        remedy="resume with the data and order the run began with, or start a new run from its checkpoint",
        falsifier="FALSIFY-APR-DIST-LOADER-004",
    )
