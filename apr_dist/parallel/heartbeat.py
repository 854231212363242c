"""Where this process is in its run: phase, step, and when it last moved. The main thread writes it.

The watch thread (``watch``) reads it and tells the other ranks. It knows nothing of PyTorch, so that it can
be kept from the first line of a run on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum


class Phase(StrEnum):
    """What a rank is doing, in the words of its messages."""

    STARTING = "starting"
    GATES = "asking the gates"
    IMPORTING = "importing PyTorch"
    JOINING = "joining the processes"
    LOADING = "loading"
    TRAINING = "training"
    EVALUATION = "evaluating"
    SAVING = "saving"
    ENDING = "ending"


@dataclass
class Heartbeat:
    """Where the main thread is.

    Attributes:
        phase: what it is doing.
        step: optimizer steps done.
        moved_at: monotonic time of its last sign of progress, in seconds.
        moves: how many there were; ranks do the same things in the same order, so fewer is behind.
        deferring: whether a signal is honoured by the loop after its step, and not at once.
        spent: seconds in each phase that was left, since the run began.
    """

    phase: Phase = Phase.STARTING
    step: int = 0
    moved_at: float = field(default_factory=time.monotonic)
    moves: int = 0
    deferring: bool = False
    spent: dict[Phase, float] = field(default_factory=dict)
    _entered_at: float = field(default_factory=time.monotonic)

    def enter(self, phase: Phase, *, step: int | None = None) -> None:
        """Begin ``phase``; of ``step`` where it changed."""
        now = time.monotonic()
        self.spent[self.phase] = self.spent.get(self.phase, 0.0) + now - self._entered_at
        self.phase, self._entered_at = phase, now
        self.step = self.step if step is None else step
        self.moved()

    def moved(self) -> None:
        """Say that something was finished: a micro-batch, a collective, a tensor."""
        self.moved_at = time.monotonic()
        self.moves += 1

    @contextmanager
    def during(self, phase: Phase, *, step: int) -> Iterator[None]:
        """Be in ``phase`` while the block runs, then in the phase before; an error keeps it."""
        before = self.phase
        self.enter(phase, step=step)
        yield
        self.enter(before)


HERE = Heartbeat()
"""The one of this process."""
