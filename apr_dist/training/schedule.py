"""The learning rate as a pure function of the step: resumable, independent of the layout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from apr_dist.choices import ScheduleKind
from apr_dist.config import TrainConfig

LR_FLOOR: Final = 1e-7
"""No schedule ends below this, unless it never was above."""


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then the shape of ``kind`` down to ``lr_min``.

    The first step already moves: step 0 of W warm-up steps uses peak / W, the last one the peak.
    ``cosine``: half a period (Loshchilov & Hutter 2017, without restarts). ``linear``: a straight line.
    ``wsd``: the peak, then over the last ``decay_steps`` one minus a square root (Haegele et al. 2024,
    arXiv:2405.18392, section 3). ``constant``: the peak to the end; it has no ``lr_min``.
    """

    peak_lr: float
    warmup_steps: int
    total_steps: int
    lr_min: float
    kind: ScheduleKind = ScheduleKind.COSINE
    decay_steps: int | None = None

    def lr_at(self, step: int) -> float:
        """Learning rate of optimizer step ``step`` (0-based); the schedule's end from ``total_steps`` on."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        if self.kind is ScheduleKind.CONSTANT:
            return self.peak_lr
        begins = self.decay_begins
        if step >= self.total_steps or begins >= self.total_steps:
            return self.lr_min
        progress = max(0, step - begins) / (self.total_steps - begins)
        return self.lr_min + (self.peak_lr - self.lr_min) * self._left(progress)

    @property
    def decay_begins(self) -> int:
        """First step whose rate may be below the peak again."""
        if self.kind is not ScheduleKind.WSD:
            return self.warmup_steps
        length = max(1, self.total_steps // 5) if self.decay_steps is None else self.decay_steps
        return max(self.warmup_steps, self.total_steps - length)

    def _left(self, progress: float) -> float:
        """Share of the way down that is left after a share of the decay."""
        if self.kind is ScheduleKind.LINEAR:
            return 1.0 - progress
        if self.kind is ScheduleKind.WSD:
            return 1.0 - math.sqrt(progress)
        return 0.5 * (1.0 + math.cos(math.pi * progress))


def schedule_of(config: TrainConfig) -> Schedule:
    """The schedule a configuration asks for."""
    options = config.optimizer
    return Schedule(
        peak_lr=config.peak_lr,
        warmup_steps=config.warmup,
        total_steps=config.num_steps,
        lr_min=min(config.peak_lr, max(config.peak_lr * options.lr_min_ratio, LR_FLOOR)),
        kind=options.schedule,
        decay_steps=options.decay_steps,
    )
