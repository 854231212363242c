"""SIGTERM and SIGINT as a request that the loop honours after the step it is in."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

from apr_dist.errors import AprDistError, Interrupted, Terminated

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""The signals that ask a run to stop; SIGTERM first, it wins when both came."""


class StopRequest:
    """While entered, the first signal is remembered; a second one acts at once, as it always did."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def as_error(self, number: int, *, step: int) -> AprDistError:
        """The error that ends the run for signal ``number``, after ``step`` was saved."""
        kind = Terminated if number == signal.SIGTERM else Interrupted
        return kind(
            f"{signal.Signals(number).name} was received and step {step} saved",
            remedy="go on with the same command and --resume auto",
        )

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
