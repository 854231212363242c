"""Optimizer steps and what they measured, without making the device wait for the host.

A step's loss and gradient norm stay where they were computed; the host reads them every few steps, all
at once. A step whose loss or norm is not a number changes no weight, and no step after it does, until
the host has read so and decided. The loop around steps is in ``trainer``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from apr_dist.data.documents import Documents
from apr_dist.data.mixture import Progress as DataProgress
from apr_dist.model.kernels.loss import IGNORE_INDEX
from apr_dist.parallel.engine import Engine
from apr_dist.parallel.heartbeat import HERE
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.step_clock import StepMarks, StepPart
from apr_dist.training.evaluation import Batch, evaluate, split_sequences
from apr_dist.training.optimizer import apply_lr


class TrainingData(Protocol):
    """Global batches by number: this rank's micro-batches, each int32 [micro_batch, seq + 1]."""

    @property
    def fingerprint(self) -> str:
        """Identity of the data."""

    def progress(self, batches: int) -> dict[str, DataProgress]:
        """How far each source has come when that many global batches were handed out."""

    def batch(self, k: int) -> list[Tensor]:
        """This rank's micro-batches of global batch ``k``."""

    @property
    def flagged(self) -> bool:
        """Whether words carry flags (`data.flags`)."""

    def documents(self, k: int, *, plain: bool = True) -> list[Documents]:
        """Where documents begin in the inputs of each of them; not ``plain``: conversations alone."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What one step measured.

    Attributes:
        step: 0-based number of the step.
        train_loss: mean cross-entropy in nats over the targets that count, before the update.
        targets: how many those are, in the global batch.
        grad_norm: global norm before clipping.
        lr: rate the optimizer used.
        wall_s: its own seconds, and its share of what lay between the steps that were read together.
        data_wait_s: seconds the host waited for the batch.
        forward_s: of ``wall_s``, in the forward of all micro-batches on this rank, the loss included.
        backward_s: of ``wall_s``, in their backward, with what is exchanged meanwhile.
        update_s: of ``wall_s``, in norm, clipping and optimizer.
        eval_loss: of the same batch through the evaluation path, where it was asked for.
        notes: sums over the ranks of what each had to tell.
    """

    step: int
    train_loss: float
    targets: int
    grad_norm: float
    lr: float
    wall_s: float
    data_wait_s: float
    forward_s: float
    backward_s: float
    update_s: float
    eval_loss: float | None
    notes: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class _Pending:
    step: int
    sums: Tensor
    norm: Tensor
    lr: float
    data_wait_s: float
    eval_loss: float | None
    marks: StepMarks


class BatchFeed:
    """Batches on the device; on CUDA the next one travels while a step computes.

    Args:
        data: global batches by number.
        device: where they go.
        ignored_ids: targets that do not count in the loss.
        isolate: keep documents of plain text apart; conversations always are.
    """

    def __init__(
        self,
        data: TrainingData,
        device: torch.device,
        *,
        ignored_ids: Sequence[int] = (),
        isolate: bool = False,
    ) -> None:
        self._data, self._device = data, device
        self._ignored_ids, self._isolate = ignored_ids, isolate
        self._stream = _side_stream(device)
        self._ahead: tuple[int, list[Batch]] | None = None

    def take(self, k: int) -> list[Batch]:
        """Global batch ``k``, ready for the current stream."""
        ahead, self._ahead = self._ahead, None
        batches = ahead[1] if ahead is not None and ahead[0] == k else self._sent(k)
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in (tensor for batch in batches for tensor in batch.tensors()):
                tensor.record_stream(current)
        return batches

    def send_ahead(self, k: int) -> None:
        """Begin to copy global batch ``k``; nothing on the CPU, where there is no copy."""
        if self._stream is not None:
            self._ahead = (k, self._sent(k))

    def _sent(self, k: int) -> list[Batch]:
        rows = self._data.batch(k)
        flagged = self._data.flagged
        apart: Sequence[Documents | None] = [None] * len(rows)
        if self._isolate or flagged:
            apart = self._data.documents(k, plain=self._isolate)
        with torch.cuda.stream(self._stream):  # a no-op without a stream
            return [
                split_sequences(row, self._device, self._ignored_ids, one, flagged=flagged)
                for row, one in zip(rows, apart, strict=True)
            ]


class Stepper:
    """Takes steps, and reads what they measured when it is asked to.

    Args:
        engine: prepared network and optimizer.
        runtime: this rank's view of the run.
        feed: batches by number.
        lr_at: the learning rate of a step.
        global_tokens: target tokens of a global batch; None: count those that are not ignored, each time.
        notes: what this rank has to tell the others, f64 [n], to be summed over all ranks.
        limits: the largest loss and gradient norm the next update may have.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        runtime: Runtime,
        feed: BatchFeed,
        lr_at: Callable[[int], float],
        global_tokens: int | None,
        notes: Callable[[], Tensor],
        limits: Callable[[], tuple[float, float]] = lambda: (math.inf, math.inf),
    ) -> None:
        self._engine, self._runtime, self._feed = engine, runtime, feed
        self._lr_at, self._global_tokens, self._notes = lr_at, global_tokens, notes
        self._limits = limits
        self._hold = torch.zeros((), dtype=torch.bool, device=runtime.device)
        self._pending: list[_Pending] = []
        self._began = 0.0

    @property
    def waiting(self) -> int:
        """Steps taken whose figures were not read yet."""
        return len(self._pending)

    def take(self, step: int, *, compare: bool, more: bool) -> None:
        """One optimizer step.

        Args:
            step: its 0-based number, and that of its global batch.
            compare: also send the batch through the evaluation path, before the update.
            more: whether the next step will follow.
        """
        began = time.perf_counter()
        if not self._pending:
            self._began = began
        clock = self._engine.clock
        clock.begin()
        batches = self._feed.take(step)
        data_wait_s = time.perf_counter() - began
        eval_loss = None
        if compare:
            clock.enter(StepPart.EVALUATION)
            evaluating = time.perf_counter()
            eval_loss = evaluate(self._engine.evaluated, batches, self._runtime).loss
            self._began += time.perf_counter() - evaluating  # not a part of any step
            clock.enter(StepPart.OTHER)
        lr = apply_lr(self._engine.optimizer, self._lr_at(step))
        sums = self._forward_backward(batches)
        if more:
            sending = time.perf_counter()
            self._feed.send_ahead(step + 1)
            data_wait_s += time.perf_counter() - sending
        self._hold = self._hold | ~torch.isfinite(sums[0])
        loss_limit, norm_limit = self._limits()
        spike = sums[0] > loss_limit * sums[1]
        clock.enter(StepPart.UPDATE)
        norm = self._engine.step(self._hold | spike, norm_limit)
        marks = clock.end()
        self._hold = self._hold | ~torch.isfinite(norm)
        self._pending.append(
            _Pending(
                step=step,
                sums=sums,
                norm=norm,
                lr=lr,
                data_wait_s=data_wait_s,
                eval_loss=eval_loss,
                marks=marks,
            )
        )

    def go_on(self) -> None:
        """Let steps change weights again after one that was not a number."""
        self._hold = torch.zeros_like(self._hold)

    def measure(self, step: int) -> Taken:
        """What a step would measure; nothing is updated."""
        self._hold = torch.ones_like(self._hold)
        self.take(step, compare=False, more=False)
        self.go_on()
        return self.read()[0]

    def read(self) -> list[Taken]:
        """What the steps since the last reading measured, in order; waits for the device, once."""
        pending, self._pending = self._pending, []
        if not pending:
            return []
        rows = torch.stack([torch.cat((one.sums, one.norm.double().view(1))) for one in pending]).tolist()
        wall_s = time.perf_counter() - self._began
        parts = [one.marks.seconds() for one in pending]
        own_s = [sum(part.values()) - part[StepPart.EVALUATION] for part in parts]
        between_s = max(wall_s - sum(own_s), 0.0) / len(pending)
        return [
            Taken(
                step=one.step,
                train_loss=row[0] / row[1] if row[1] else float("nan"),
                targets=int(row[1]),
                grad_norm=row[-1],
                lr=one.lr,
                wall_s=own + between_s,
                data_wait_s=one.data_wait_s,
                forward_s=part[StepPart.FORWARD],
                backward_s=part[StepPart.BACKWARD],
                update_s=part[StepPart.UPDATE],
                eval_loss=one.eval_loss,
                notes=tuple(row[2:-1]),
            )
            for one, row, part, own in zip(pending, rows, parts, own_s, strict=True)
        ]

    def _forward_backward(self, batches: list[Batch]) -> Tensor:
        """Gradients of the global batch; loss sum, targets, and notes, f64, summed over all ranks."""
        # Gradients are those of (sum of token losses) / (targets of the global batch that count). Engines
        # average over ranks, so each rank's share is scaled by the world size first.
        counted = self._counted(batches)
        scale = self._runtime.world_size / counted
        total = torch.zeros((), dtype=torch.float64, device=self._runtime.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            self._engine.clock.enter(StepPart.FORWARD)
            total += self._engine.accumulate(*batch, scale=scale, last=last).double()
            self._engine.clock.enter(StepPart.OTHER)
            HERE.moved()
        # A signal to one rank stops all, and so does a save that failed on one: both travel with the loss,
        # at no further collective.
        sums = self._runtime.sum(torch.cat((total.view(1), self._notes())))
        return torch.cat((sums[:1], torch.ones_like(sums[:1]) * counted, sums[1:]))

    def _counted(self, batches: list[Batch]) -> int | Tensor:
        """Targets of the global batch that count; on the device and a collective where some may not."""
        if self._global_tokens is not None:
            return self._global_tokens
        here = sum((batch.targets != IGNORE_INDEX).sum() for batch in batches)
        return self._runtime.sum(torch.as_tensor(here, dtype=torch.float64))


def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
