"""The held-out sequences, in an order that never changes: all of them or a fixed sample."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.dlpack import from_dlpack

from apr_dist.choices import ShardAccess, VerifyShards
from apr_dist.data.token_stream import ShardStream, choice, share_of
from apr_dist.errors import UsageError

if TYPE_CHECKING:
    from apr_dist.data.manifest import Manifest


class EvaluationLoader:
    """The held-out sequences in a fixed order: all of them, or a fixed sample; re-iterable.

    Every rank yields the same number of batches, so that collectives match; together they hold each
    sequence exactly once. The last batch is smaller where the numbers do not divide, on some ranks
    possibly [0, seq_length + 1].

    Args:
        dataset: the held-out shards.
        seq_length: tokens predicted per sequence; a row holds one more.
        micro_batch: sequences per tensor.
        rank: this process.
        world_size: processes that share the work.
        max_sequences: size of the sample; None or more than there are: all of them.
        verify: when shard hashes are checked.
        access: how shards are read.

    Raises:
        UsageError, ManifestError, DataError, ShardError: as ``TokenLoader``.
    """

    def __init__(
        self,
        dataset: Manifest,
        *,
        seq_length: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        max_sequences: int | None = None,
        verify: VerifyShards | str = VerifyShards.FIRST_TOUCH,
        access: ShardAccess | str = ShardAccess.MMAP,
    ) -> None:
        share_of(micro_batch * world_size, micro_batch, rank, world_size)
        if max_sequences is not None and max_sequences < 1:
            raise UsageError(f"max_sequences is {max_sequences}", expected="at least 1, or none for all")
        self._dataset, self._seq_length, self._micro = dataset, seq_length, micro_batch
        self._rank, self._world_size = rank, world_size
        options: dict[str, Any] = {
            "seq_length": seq_length,
            "shuffle": "none" if max_sequences is None else "sample",
            "sample": max_sequences or 0,
            "verify": choice(VerifyShards, verify, "verify").value,
            "access": choice(ShardAccess, access, "access").value,
        }
        self._stream = ShardStream(dataset, options)

    @property
    def sequences(self) -> int:
        """Sequences that all ranks together evaluate."""
        return self._stream.open().length or 0

    @property
    def fingerprint(self) -> str:
        """Identity of the held-out shards."""
        return self._dataset.fingerprint

    @property
    def flagged(self) -> bool:
        """Whether words of batches carry flags (`flags`): the shards hold conversations."""
        return self._dataset.flagged

    def __len__(self) -> int:
        """Batches on every rank."""
        together = self._micro * self._world_size
        return (self.sequences + together - 1) // together

    def __iter__(self) -> Iterator[torch.Tensor]:
        """This rank's batches, each int32 [at most micro_batch, seq_length + 1]."""
        stream, together = self._stream.open(), self._micro * self._world_size
        for first in range(0, self.sequences, together):
            size = min(together, self.sequences - first)
            begin = first + size * self._rank // self._world_size
            end = first + size * (self._rank + 1) // self._world_size
            yield from_dlpack(stream.gather(begin, end - begin))

    def describe(self) -> str:
        """Which sequences these are, in one line for logs and verdicts."""
        there = self._stream.open().sequences(0)
        which = (
            f"all {there:,}"
            if self.sequences == there
            else f"a fixed sample of {self.sequences:,} of {there:,}"
        )
        name, fingerprint = self._dataset.folder.name, self._dataset.fingerprint[:12]
        return f"{which} sequences of {self._seq_length:,} tokens from {name} ({fingerprint})"

    def close(self) -> None:
        """Let go of the shards; using the loader reopens them."""
        self._stream.close()
