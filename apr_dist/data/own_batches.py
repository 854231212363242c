"""Token batches that a program hands in, in place of shards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from apr_dist.data.documents import Documents
from apr_dist.data.mixture import Progress
from apr_dist.errors import DataError, StreamExhausted, UsageError


class OwnBatches:
    """Global batches from an iterable that every rank iterates alike; each rank takes its rows.

    Args:
        batches: global batches, each integers [batch_size, seq_length + 1]; taken in order, once each.
        batch_size: sequences of a global batch.
        micro_batch: sequences per tensor.
        seq_length: tokens predicted per sequence.
        vocab_size: ids must be below this.
        rank: this process.
        world_size: processes that share a global batch.
    """

    flagged = False
    fingerprint = "the program's own"

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        batch_size: int,
        micro_batch: int,
        seq_length: int,
        vocab_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._shape, self._vocab_size = (batch_size, seq_length + 1), vocab_size
        self._micro, self._share = micro_batch, batch_size // world_size
        self._first = rank * self._share
        self._batches: Iterator[Any] = iter(batches)
        self._taken = 0

    def progress(self, batches: int) -> dict[str, Progress]:
        """Sequences handed out in that many batches; an iterable has no passes."""
        return {"own": Progress(batches * self._shape[0], 0, 0)}

    def documents(self, k: int, *, plain: bool = True) -> list[Documents]:  # noqa: ARG002
        """Own batches record no documents.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "loader.documents is isolate and own batches record no documents",
            expected="loader.documents continue, or shards",
        )

    def batch(self, k: int) -> list[torch.Tensor]:
        """This rank's micro-batches of global batch ``k``, each int32 [micro_batch, seq_length + 1].

        Batches before ``k`` that were not taken yet are skipped, as a resumed run needs.

        Raises:
            StreamExhausted: the iterable has ended.
            DataError: a batch has another shape, other numbers than integers, or an id out of range.
        """
        if k < self._taken:
            raise UsageError(f"batch {k} was asked for again", expected=f"batch {self._taken} or a later one")
        item: Any = None
        while self._taken <= k:
            try:
                item = next(self._batches)
            except StopIteration:
                raise StreamExhausted(
                    f"the program's own batches ended after {self._taken}",
                    expected=f"batch {k} and all before it",
                    remedy="hand in more batches, or train fewer steps",
                    falsifier="FALSIFY-APR-DIST-LOADER-009",
                ) from None
            self._taken += 1
        rows = self._checked(item, k)
        return list(torch.split(rows[self._first : self._first + self._share].contiguous(), self._micro))

    def _checked(self, item: Any, k: int) -> torch.Tensor:
        rows = torch.as_tensor(item)
        integers = not (rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool)
        if tuple(rows.shape) != self._shape or not integers:
            raise DataError(
                f"batch {k} is {rows.dtype} {tuple(rows.shape)}",
                expected=f"integer token ids of shape {self._shape}",
                remedy="hand in batches of batch_size rows with seq_length + 1 ids each",
            )
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= self._vocab_size:
            raise DataError(
                f"batch {k} contains the token id {low if low < 0 else high}",
                expected=f"ids from 0 to {self._vocab_size - 1}, the rows of the model's embedding",
                remedy="encode with this model's tokenizer",
            )
        return rows.to("cpu", torch.int32)


class OwnHeldOut:
    """Held-out batches of a program: each rank's rows of each, iterated once per evaluation.

    Args:
        batches: global batches as of `OwnBatches`, iterable more than once.
        sizes: the numbers that `OwnBatches` takes.

    Raises:
        UsageError: they can be iterated once only.
    """

    flagged = False
    fingerprint = "the program's own"

    def __init__(self, batches: Iterable[Any], **sizes: int) -> None:
        if iter(batches) is batches:
            raise UsageError(
                "the held-out batches can be iterated once only",
                expected="a list or another object that begins again, since every evaluation reads all",
                remedy="pass list(batches)",
            )
        self._batches, self._sizes = batches, sizes

    def __iter__(self) -> Iterator[torch.Tensor]:
        share = OwnBatches(self._batches, **self._sizes)
        k = 0
        with contextlib.suppress(StreamExhausted):
            while True:
                yield from share.batch(k)
                k += 1
