"""The learning rate as a pure function of the step: resumable, independent of the layout."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a cosine to ``lr_min`` (Loshchilov & Hutter 2017, without restarts).

    The first step already moves: step 0 of W warm-up steps uses peak / W, the last one the peak.
    """

    peak_lr: float
    warmup_steps: int
    total_steps: int
    lr_min: float

    def lr_at(self, step: int) -> float:
        """Learning rate of optimizer step ``step`` (0-based); ``lr_min`` from ``total_steps`` on."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        decay_steps = self.total_steps - self.warmup_steps
        if step >= self.total_steps or decay_steps <= 0:
            return self.lr_min
        progress = (step - self.warmup_steps) / decay_steps
        return self.lr_min + 0.5 * (self.peak_lr - self.lr_min) * (1.0 + math.cos(math.pi * progress))
