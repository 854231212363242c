"""The held-out loss: the same sequences every time, through the live weights, changing nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import NamedTuple, Protocol

import torch
from torch import nn

from apr_dist.data.documents import Documents, loss_mask
from apr_dist.data.flags import input_ids, not_targets
from apr_dist.errors import DataError
from apr_dist.model.kernels.loss import IGNORE_INDEX
from apr_dist.model.packing import Boundaries
from apr_dist.model.routing import Routing
from apr_dist.model.sending import send
from apr_dist.parallel.heartbeat import HERE
from apr_dist.parallel.runtime import Runtime
from apr_dist.runs.progress import Evaluation

STOP_EVERY = 8
"""Batches between two agreements of the ranks on whether a signal came."""


class EvaluationStopped(Exception):
    """The measurement was given up; there is no figure."""


class HeldOut(Protocol):
    """This rank's share of the held-out sequences, in a fixed order."""

    @property
    def fingerprint(self) -> str:
        """Identity of the data they are from."""

    @property
    def flagged(self) -> bool:
        """Whether words carry flags (`data.flags`)."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Token ids, each int32 [batch, seq + 1]; as many batches on every rank."""


class Batch(NamedTuple):
    """One micro-batch on the device, each [batch, seq]; where documents begin, if they are kept apart."""

    inputs: torch.Tensor
    targets: torch.Tensor
    document_ids: Boundaries | None = None

    def tensors(self) -> list[torch.Tensor]:
        """All there is on the device."""
        here = [self.inputs, self.targets]
        return here if self.document_ids is None else [*here, self.document_ids.edges]


def split_sequences(
    tokens: torch.Tensor,
    device: torch.device,
    ignored_ids: Sequence[int] = (),
    documents: Documents | None = None,
    *,
    flagged: bool = False,
) -> Batch:
    """[batch, seq + 1] token ids to inputs and targets, each [batch, seq], on the device.

    Ids travel as 32-bit; targets widen to int64 only where they are used. Those among ``ignored_ids``
    become -100, which no loss counts, and so do those that ``flagged`` words say are no targets; without
    ``documents`` conversations are kept apart by their flags.
    """
    moved = tokens.to(device, non_blocking=True)
    inputs, targets = moved[:, :-1], moved[:, 1:]
    if flagged:
        ignored = not_targets(targets)
        inputs, targets = input_ids(inputs), input_ids(targets).long().masked_fill(ignored, IGNORE_INDEX)
        documents = documents or Documents.of_flagged(tokens)
    targets = targets.long()
    if ignored_ids:
        targets = targets.where(loss_mask(targets, ignored_ids=ignored_ids), IGNORE_INDEX)
    boundaries = None
    if documents is not None:
        boundaries = Boundaries(send(documents.cu_seqlens, device), (targets.shape[0], targets.shape[1]))
    return Batch(inputs, targets, boundaries)


def _nothing_to_count(batch: Batch) -> Batch:
    """One row without a target that counts, for a rank whose share of the last batch is empty.

    The other ranks may need its part of the collectives of a forward.
    """
    rows = torch.zeros((1, batch.inputs.shape[1]), dtype=batch.inputs.dtype, device=batch.inputs.device)
    return Batch(rows, torch.full_like(rows, IGNORE_INDEX, dtype=torch.long), None)


def evaluate(
    model: nn.Module,
    batches: Iterable[torch.Tensor | Batch],
    runtime: Runtime,
    *,
    progress: Callable[[int, int], None] | None = None,
    ignored_ids: Sequence[int] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Mean loss of the bare decoder over this rank's batches, summed over all ranks.

    Reads the parameters themselves, in evaluation mode, without gradients; the mode the model was in
    is restored. Sums are f64, so the order of ranks does not show in f32 losses.

    Args:
        model: the decoder, not its distributed wrapper.
        batches: token ids, each [batch, seq + 1], or batches that are on the device already; ``flagged``
            ones carry flags in their words.
        runtime: this rank's view of the run.
        progress: called about every five seconds with (batches done, batches in all).
        ignored_ids: targets that do not count.
        stop: asked by all ranks together after every ``STOP_EVERY`` batches whether to give up.

    Raises:
        EvaluationStopped: ``stop`` said so, on every rank.
        DataError: there was no token to evaluate on any rank.
    """
    started, told = time.perf_counter(), time.perf_counter()
    total = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    routing: Routing | None = getattr(getattr(model, "module", model), "routing", None)
    if routing is not None:
        routing.take_measured(runtime.device)  # of a measurement that was given up
    was_training, flagged = model.training, bool(getattr(batches, "flagged", False))
    model.eval()
    try:
        with torch.no_grad(), runtime.accelerator.autocast():
            for done, tokens in enumerate(batches, start=1):
                batch = tokens
                if not isinstance(batch, Batch):
                    batch = split_sequences(batch, runtime.device, ignored_ids, flagged=flagged)
                if not len(batch.inputs):
                    batch = _nothing_to_count(batch)
                loss_sum, count = model(batch.inputs, batch.targets, document_ids=batch.document_ids)
                total[0] += loss_sum.double()
                total[1] += count
                HERE.moved()
                if done % STOP_EVERY == 0 and stop():
                    raise EvaluationStopped
                if progress is not None and time.perf_counter() - told > 5:
                    told = time.perf_counter()
                    progress(done, len(batches) if isinstance(batches, Sized) else 0)
    finally:
        model.train(was_training)
    sums = runtime.sum(
        total if routing is None else torch.cat((total, routing.take_measured(runtime.device)))
    )
    loss_sum, count = sums[:2].tolist()
    if not count:
        raise DataError("there is no held-out target to evaluate", expected="at least one whole sequence")
    return Evaluation(
        loss=loss_sum / count,
        tokens=int(count),
        wall_s=time.perf_counter() - started,
        routing=None if routing is None else routing.figures(sums[2:]),
    )
