"""Contenders of ``bench_train``, each in a process of its own, that take turns step by step.

In one process they would not be what a user runs: they would share an allocator and its settings, and
threads that compute, with more workers together than there are cores, make libgomp wait in the kernel at the
end of every parallel region. Commands and replies are lines over two pipes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, Protocol

STEP, ACTIVATIONS, RATE = "step", "activations", "rate"


class Step(NamedTuple):
    """One optimizer step: its seconds, and the loss before it where the contender tells it.

    ``data_wait_s`` are the seconds that the host waited for its batch, where that is known.
    """

    seconds: float
    loss: float | None = None
    data_wait_s: float | None = None


class Contender(Protocol):
    """What takes turns."""

    def step(self) -> Step:
        """One optimizer step."""
        ...

    def activation_bytes(self) -> int:
        """Peak of live bytes in one forward and backward, beyond what outlives them."""
        ...

    def product_rate(self) -> float:
        """Operations a second of one large product, as its steps multiply."""
        ...


class Channel:
    """A contender's end: commands come, replies go."""

    def __init__(self, commands: int, replies: int) -> None:
        self._commands = os.fdopen(commands, encoding="utf-8")
        self._replies = os.fdopen(replies, "w", encoding="utf-8")

    def command(self) -> str:
        """The next command; empty when there will be none."""
        return self._commands.readline().strip()

    def reply(self, **values: Any) -> None:
        """Answer the command before, or say for the first time that one may come."""
        print(json.dumps(values), file=self._replies, flush=True)

    def serve(self, contender: Contender) -> None:
        """Do what is asked until nothing is."""
        self.reply()
        while command := self.command():
            if command == STEP:
                self.reply(**contender.step()._asdict())
            elif command == ACTIVATIONS:
                self.reply(bytes=contender.activation_bytes())
            else:
                self.reply(rate=contender.product_rate())


class Absent(Exception):
    """A contender that cannot be there, and why."""


class Seat:
    """The other end: a contender in a process of its own, which waits for its turn.

    Args:
        name: of the contender, which ``script`` is told as ``--serve``, with its two pipes as ``--channel``.
        script: what the process runs, with ``arguments``.
        scratch: a folder for what PyTorch compiles there.

    Raises:
        Absent: it says that it cannot take part.
        RuntimeError: it ended.
    """

    def __init__(self, name: str, script: Path, arguments: list[str], scratch: Path) -> None:
        self.name = name
        commands, self._commands = os.pipe()
        self._replies, replies = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, script, *arguments, "--serve", name, "--channel", str(commands), str(replies)],
            pass_fds=(commands, replies),
            stdout=sys.stderr,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(scratch / name.replace(" ", "-"))},
        )
        os.close(commands)
        os.close(replies)
        self._lines = os.fdopen(self._replies, encoding="utf-8")
        absent = self._reply().get("absent")
        if absent is not None:
            self.leave()
            raise Absent(absent)

    def step(self) -> Step:
        """One step of it, while all others wait."""
        return Step(**self._ask(STEP))

    def activation_bytes(self) -> int:
        """See `Contender`."""
        return int(self._ask(ACTIVATIONS)["bytes"])

    def product_rate(self) -> float:
        """See `Contender`."""
        return float(self._ask(RATE)["rate"])

    def leave(self) -> None:
        """Let the process end."""
        os.close(self._commands)
        self._lines.close()
        self._process.wait()

    def _ask(self, command: str) -> dict[str, Any]:
        os.write(self._commands, f"{command}\n".encode())
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found
