"""What SIGTERM and SIGINT mean to the main thread: the end at once, or after the step that is being taken.

Outside of training a signal is an error like any other, raised where the main thread is. In the loop it is
a request that all ranks honour together. A main thread that is held in a collective is ended by
``parallel.watchdog``.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any, Self

from apr_dist.errors import AprDistError, Interrupted, Terminated
from apr_dist.parallel.heartbeat import HERE
from apr_dist.parallel.watchdog import SAME_REQUEST_S

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""The signals that ask a run to stop; SIGTERM first, it wins when both came."""


def as_error(number: int, what: str) -> AprDistError:
    """The error that ends a run for signal ``number``."""
    kind = Terminated if number == signal.SIGTERM else Interrupted
    name = signal.Signals(number).name
    return kind(f"{name} was received {what}", remedy="go on with the same command and --resume auto")


def first_signal(ranks: Sequence[float]) -> int:
    """The signal to honour, or 0, from how many ranks each of ``SIGNALS`` came to."""
    return next((int(number) for number, count in zip(SIGNALS, ranks, strict=True) if count), 0)


class _Handlers:
    """Handlers of the signals while entered; other threads than the main one leave them alone."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError


class AtOnce(_Handlers):
    """While entered, the first signal is an error in the main thread; those after it change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._armed = True

    def disarm(self) -> None:
        """The run is ending anyway: the launcher may well tell it to."""
        self._armed = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._armed:
            self._armed = False
            raise as_error(number, f"at step {HERE.step} while {HERE.phase}; what was saved before is whole")


class StopRequest(_Handlers):
    """While entered, the first signal is remembered; a later one acts at once, as it would without this.

    Launchers hand a signal on that their workers have had already, so what follows within
    ``SAME_REQUEST_S`` is the same request.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received, self._at = 0, 0.0

    def __enter__(self) -> Self:
        HERE.deferring = True
        return super().__enter__()

    def __exit__(self, *reason: object) -> None:
        HERE.deferring = False
        super().__exit__(*reason)

    def as_error(self, number: int, *, step: int) -> AprDistError:
        """The error that ends the run for signal ``number``, after ``step`` was saved."""
        return as_error(number, f"and step {step} saved" if step else "before the first step")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._at = number, now
        elif now - self._at >= SAME_REQUEST_S:
            before = self._before[number]
            self.__exit__()
            if callable(before):
                before(number, frame)
            else:
                signal.raise_signal(number)
