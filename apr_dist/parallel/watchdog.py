"""The thread that lets no rank fail, hang or be told to stop alone.

Beside the main thread of every rank, from the first line of a run to its last, it hears signals even while
the main thread waits in a collective, hears of the other ranks over the side channel, and ends this process
when the main thread does not. The first failure of a run is the one every rank ends with: its rank, step,
phase and exit code. How ranks are connected is in ``side_channel``; what a signal means to the loop is in
``training.signals``.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from apr_dist.errors import ExitCode
from apr_dist.parallel.control_channel import Line, connect, listen
from apr_dist.parallel.heartbeat import HERE, Heartbeat
from apr_dist.parallel.launch import read_launch

TOGETHER = "FALSIFY-APR-DIST-DISTRIBUTED-006"
"""Falsifier of what ends all ranks because of one."""

GRACE_S = 4.0
"""How long the main thread may take to end by itself once this rank has to end."""

ANOTHER_RANK_S = 3.0
"""How long a rank whose collective broke off waits to hear which rank it was that failed."""

SAME_REQUEST_S = 2.0
"""A second signal within this time is the launcher handing on the first one."""

SILENT_REPORTS = 3
"""A process that left out this many reports is frozen, whatever it said last."""

TICK_S = 0.25
RANKS_PER_SECOND = 64
"""How many ranks' reports rank 0 takes in a second; beyond that each reports less often."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What ended the run.

    Attributes:
        rank: where it happened.
        step: optimizer steps that rank had done.
        phase: what it was doing.
        code: the exit code of every rank.
        text: the error, as printed.
        hang: whether nothing was happening any more; every rank then shows its stack.
    """

    rank: int
    step: int
    phase: str
    code: int
    text: str
    hang: bool = False


class Watch:
    """The watch thread of one rank.

    Args:
        rank: of this process.
        here: where its main thread is.

    Attributes:
        on_failure: called once, in the watch thread, with a failure that is not this rank's own.
    """

    def __init__(self, *, rank: int, here: Heartbeat = HERE) -> None:
        self.on_failure: Callable[[Failure], None] | None = None
        self._rank, self._here = rank, here
        self._lock = threading.Lock()
        self._known, self._told = threading.Event(), threading.Event()
        self._failure: Failure | None = None
        self._leaving = self._waited = False
        self._deadline: tuple[float, int] | None = None
        self._signal_at: float | None = None
        self._hang_s, self._interval_s, self._reported_at = float("inf"), 1.0, 0.0
        self._lines: dict[int, Line] = {}
        self._places: dict[int, dict[str, Any]] = {}
        self._word = ""
        self._selector = selectors.DefaultSelector()
        self._awaken, self._awakened = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="apr-dist-watch", daemon=True)
        self._wakeup_before: int | None = None

    def start(self) -> Watch:
        """Hear signals from now on."""
        self._awaken.setblocking(False)
        self._awakened.setblocking(False)
        self._selector.register(self._awakened, selectors.EVENT_READ, self._on_wakeup)
        if threading.current_thread() is threading.main_thread():
            self._wakeup_before = signal.set_wakeup_fd(self._awaken.fileno(), warn_on_full_buffer=False)
        self._thread.start()
        return self

    def join(
        self, *, world_size: int, hang_s: float, tell_all: Callable[[Any], Any] = lambda value: value
    ) -> None:
        """Hear the other ranks from now on; a collective.

        Args:
            world_size: number of ranks.
            hang_s: a run in which no rank has moved for this long is ended, in seconds.
            tell_all: hands rank 0's JSON value to every rank.

        Raises:
            DistributedError: rank 0 cannot be reached.
        """
        if world_size > 1 and self._rank == 0:
            listener, contact = listen()
            self._word = contact["word"]
            self._selector.register(listener, selectors.EVENT_READ, self._accept)
            self._nudge()
            tell_all(contact)
        elif world_size > 1:
            self._hold(0, connect(tell_all(None), rank=self._rank))
        self._here.moves = 0
        self._interval_s = max(1.0, world_size / RANKS_PER_SECOND)
        self._hang_s = hang_s
        self._nudge()

    def failure(self, *, wait_s: float = 0.0) -> Failure | None:
        """The failure this rank has to end with, if there is one within ``wait_s``."""
        self._known.wait(wait_s)
        return self._failure

    def cause_of(self, error: BaseException) -> Failure | None:
        """The failure, of any rank, that is already known when this rank raises ``error``.

        A collective that breaks off may raise before word of the rank that failed is here, so after a
        ``RuntimeError`` among several ranks it is waited for, once.
        """
        broken_off = isinstance(error, RuntimeError) and read_launch().world_size > 1
        waits, self._waited = broken_off and not self._waited, self._waited or broken_off
        return self.failure(wait_s=ANOTHER_RANK_S if waits else 0.0)

    def fail(self, code: ExitCode, text: str) -> Failure:
        """End every rank with this rank's error; returns the failure that came first."""
        with self._lock:
            self._failure = failure = self._failure or self._own(code, text)
        self._known.set()
        self._nudge()
        self._told.wait(GRACE_S)
        return failure

    @property
    def connected(self) -> bool:
        """Whether another rank learns of a failure here."""
        return bool(self._lines)

    def leave(self) -> None:
        """Say goodbye: from here on this rank's end is nobody's concern."""
        self._leaving = True
        self._nudge()
        if self._thread.is_alive():
            self._thread.join(GRACE_S)
        if self._wakeup_before is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            self._wakeup_before = None
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._selector.close()
        self._awaken.close()

    def _nudge(self) -> None:
        with contextlib.suppress(OSError):
            self._awaken.send(b"\0")

    def _run(self) -> None:
        while not self._leaving:
            for key, _ in self._selector.select(TICK_S):
                key.data(key.fileobj)
            self._tick()
        for line in self._lines.values():
            line.send({"kind": "bye"})

    def _tick(self) -> None:
        now = time.monotonic()
        if self._failure is not None and not self._told.is_set():
            self._tell(self._failure)
        if now - self._reported_at >= self._interval_s:
            self._reported_at = now
            self._report(now)
        if self._deadline is not None and now >= self._deadline[0]:
            self._end(self._deadline[1])

    def _tell(self, failure: Failure) -> None:
        for rank, line in self._lines.items():
            if rank != failure.rank or failure.hang:  # its own error a rank knows; that it hangs, it does not
                line.send({"kind": "fail", **asdict(failure)})
        self._told.set()

    # --- signals ------------------------------------------------------------------------------------

    def _on_wakeup(self, awakened: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for number in awakened.recv(4096):
                if number in (signal.SIGTERM, signal.SIGINT):
                    self._on_signal(number)

    def _on_signal(self, number: int) -> None:
        """Where the main thread does not honour a signal in time, honour it here."""
        now, first = time.monotonic(), self._signal_at
        self._signal_at = first or now
        if self._here.deferring and (first is None or now - first < SAME_REQUEST_S):
            if first is None and self._rank == 0:
                _print("stopping after this step, saving; again to stop at once")
            return
        self._deadline = self._deadline or (now + GRACE_S, 128 + number)

    # --- the other ranks ----------------------------------------------------------------------------

    def _hold(self, rank: int, line: Line) -> None:
        line.socket.settimeout(GRACE_S)
        self._lines[rank] = line
        self._selector.register(line.socket, selectors.EVENT_READ, lambda _: self._hear(rank, line))

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            line = Line(connection)
            connection.settimeout(GRACE_S)
            hello = (line.receive() or [{}])[0]
            if hello.get("kind") != "hello" or hello.get("word") != self._word:
                line.close()
                return
            line.send({"kind": "welcome", "word": self._word})
            self._hold(int(hello["rank"]), line)
            if self._failure is not None:
                line.send({"kind": "fail", **asdict(self._failure)})

    def _hear(self, rank: int, line: Line) -> None:
        messages = line.receive()
        for message in messages or ():
            kind = message.pop("kind", None)
            if kind == "at":
                self._places[rank] = {**message, "heard_at": time.monotonic()}
            elif kind == "fail":
                self._learn(Failure(**message))
            elif kind == "bye":
                messages = None
                self._places.pop(rank, None)
                break
        else:
            if messages is None:
                self._learn(self._death(rank), witnessed=True)
        if messages is None:
            self._selector.unregister(line.socket)
            self._lines.pop(rank, None)
            line.close()

    def _death(self, rank: int) -> Failure:
        place = self._places.get(rank, {})
        step, phase = int(place.get("step", self._here.step)), str(place.get("phase", self._here.phase.value))
        text = (
            f"[{TOGETHER}] rank {rank} is gone, last seen at step {step} while {phase}: it was killed, or its"
            " host cannot be reached. Expected every rank to run to the end. Fix: look at that host's"
            " log and memory, and go on with --resume auto."
        )
        return Failure(rank=rank, step=step, phase=phase, code=int(ExitCode.DISTRIBUTED), text=text)

    def _learn(self, failure: Failure, *, witnessed: bool = False) -> None:
        """Take the first failure of the run for this rank's own, and hand it on.

        A rank prints its own error, and rank 0 every other rank's; who sees rank 0 die speaks for it.
        """
        with self._lock:
            if self._failure is not None:
                return
            self._failure = failure
        self._tell(failure)
        self._known.set()
        where = f"rank {failure.rank}, at step {failure.step} while {failure.phase}"
        if failure.hang:
            self._show_stack()
        elif witnessed or self._rank == 0:
            stopped = failure.code in (ExitCode.INTERRUPTED, ExitCode.TERMINATED)
            _print(f"error: {failure.text}" if stopped else f"error of {where}: {failure.text}")
        if self.on_failure is not None:
            self.on_failure(failure)
        self._deadline = self._deadline or (time.monotonic() + GRACE_S, failure.code)

    # --- a run that stands still --------------------------------------------------------------------

    def _report(self, now: float) -> None:
        here = self._here
        place: dict[str, Any] = {"step": here.step, "phase": here.phase.value, "moves": here.moves}
        place["still_s"] = now - here.moved_at
        if self._rank != 0:
            for line in self._lines.values():
                line.send({"kind": "at", **place})
            return
        self._places[0] = {**place, "heard_at": now}
        still = {rank: now - one["heard_at"] + one["still_s"] for rank, one in self._places.items()}
        if min(still.values()) > self._hang_s and self._failure is None:
            self._learn(self._hang(now, still))

    def _hang(self, now: float, still: dict[int, float]) -> Failure:
        def behind(rank: int) -> tuple[bool, int, float]:
            place = self._places[rank]
            silent = now - place["heard_at"] > SILENT_REPORTS * self._interval_s
            return silent, -place["moves"], still[rank]

        first = max(still, key=behind)
        lines = [
            f"  rank {rank}: step {place['step']}, {place['phase']}, not moved for {still[rank]:.1f} s"
            for rank, place in sorted(self._places.items())
        ]
        place = self._places[first]
        text = (
            f"[{TOGETHER}] no rank has moved for {self._hang_s:.0f} s; rank {first} is behind, at step"
            f" {place['step']} while {place['phase']}. Expected progress within parallel.hang_s. Fix:"
            " look at the stacks, and go on with --resume auto; raise --parallel.hang-s if it was only slow."
        )
        _print("\n".join([f"error: {text}", *lines]))
        code = int(ExitCode.DISTRIBUTED)
        return Failure(rank=first, step=place["step"], phase=place["phase"], code=code, text=text, hang=True)

    def _show_stack(self) -> None:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        here = self._here
        _print(f"rank {self._rank} stands at step {here.step} while {here.phase}, in\n{stack}")

    def _end(self, code: int) -> None:
        """End this process: its main thread is held by something that will not let go."""
        if self._failure is None:
            name = signal.Signals(code - 128).name
            failure = self._own(code, f"{name} was received, and the main thread did not end in {GRACE_S} s.")
            _print(
                f"error on rank {failure.rank}, at step {failure.step} while {failure.phase}: {failure.text}"
            )
            self._failure = failure
            self._tell(failure)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _own(self, code: int, text: str) -> Failure:
        here = self._here
        return Failure(rank=self._rank, step=here.step, phase=here.phase.value, code=int(code), text=text)


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
