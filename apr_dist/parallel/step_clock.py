"""When the parts of a step began and ended, by the clock of the device that computes them.

Nothing waits here. On a GPU a mark goes into its queue, behind the work it was given so far; how long lay
between two marks is asked after the GPU has come past both.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

import torch


class StepPart(StrEnum):
    """What a rank does in a step; everything it does is in one of them."""

    FORWARD = "forward"
    BACKWARD = "backward"
    UPDATE = "update"
    EVALUATION = "evaluation"
    OTHER = "other"


Mark = Any
"""Seconds on the host's clock, or on a GPU an event in its queue."""


@dataclass(frozen=True)
class StepMarks:
    """One step's parts, in order: what began, and when. The last one is where the step ended."""

    marks: tuple[tuple[StepPart, Mark], ...]

    def seconds(self) -> Mapping[StepPart, float]:
        """Seconds by part; on a GPU it must have come past the last mark."""
        found = dict.fromkeys(StepPart, 0.0)
        for (part, began), (_, ended) in pairwise(self.marks):
            on_host = isinstance(began, float)
            found[part] += ended - began if on_host else began.elapsed_time(ended) / 1e3
        return found


class StepClock:
    """Marks the parts of one step after the other.

    Args:
        device: what computes them.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[StepPart, Mark]] = []

    def begin(self) -> None:
        """Begin a step; one that never ended is forgotten."""
        self._marks = []
        self.enter(StepPart.OTHER)

    def enter(self, part: StepPart) -> None:
        """Begin ``part``, which ends the one before it."""
        self._marks.append((part, self._now()))

    def end(self) -> StepMarks:
        """End the step."""
        self.enter(StepPart.OTHER)
        return StepMarks(tuple(self._marks))

    def _now(self) -> Mark:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
