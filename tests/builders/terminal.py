"""A real pseudo-terminal for a command, and the screen it leaves as a person would see it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyte

from builders.runs import REPOSITORY


@dataclass(frozen=True)
class Shown:
    """What a terminal got: its raw bytes, every line it showed at the end, and the command's exit code."""

    raw: bytes
    lines: list[str]
    code: int

    @property
    def text(self) -> str:
        """All lines."""
        return "\n".join(self.lines)


def run_in_terminal(
    command: Sequence[str],
    *,
    columns: int,
    interrupt_when: Callable[[bytes], bool] | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 120,
) -> Shown:
    """Run a command on a terminal of ``columns``, sending SIGINT once when the output so far asks for it."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    cleared = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "CI", "COLUMNS")}
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**cleared, "TERM": "xterm-256color", **(environment or {})},
        start_new_session=True,
    )
    os.close(slave)
    raw, deadline = b"", time.monotonic() + timeout_s
    try:
        while time.monotonic() < deadline and (chunk := _read(master, process)) is not None:
            raw += chunk
            if interrupt_when is not None and interrupt_when(raw):
                process.send_signal(signal.SIGINT)
                interrupt_when = None
        code = process.wait(max(1.0, deadline - time.monotonic()))
    finally:
        process.kill()
        process.wait()
        os.close(master)
    return Shown(raw=raw, lines=screen_lines(raw, columns), code=code)


def screen_lines(raw: bytes, columns: int, *, rows: int = 400) -> list[str]:
    """What a terminal tall enough to scroll nothing away shows after these bytes."""
    screen = pyte.Screen(columns, rows)
    pyte.ByteStream(screen).feed(raw)
    lines = [line.rstrip() for line in screen.display]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _read(master: int, process: subprocess.Popen[bytes]) -> bytes | None:
    """The next bytes; nothing when none came for a moment; None when the command has ended."""
    ready, _, _ = select.select([master], [], [], 0.2)
    if not ready:
        return None if process.poll() is not None else b""
    try:
        return os.read(master, 65536) or None
    except OSError:  # the last holder of the other end is gone
        return None
