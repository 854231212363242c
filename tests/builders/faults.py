"""Real launches of the trainer that faults are done to: started, read line by line, hurt, waited for."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from builders.runs import REPOSITORY, TRAIN

ENDLESS = ("--num-steps", "100000", "--eval-every", "100000", "--early-stop.patience", "100000")


@dataclass
class Launch:
    """Ranks of one run, each started here, so that each one's own exit code is seen.

    Attributes:
        ranks: the processes, by rank.
        said: what each rank printed so far, stdout and stderr together.
    """

    ranks: list[subprocess.Popen[str]]
    said: list[list[str]] = field(default_factory=list)
    _readers: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        for process in self.ranks:
            lines: list[str] = []
            self.said.append(lines)
            reader = threading.Thread(target=self._read, args=(process, lines), daemon=True)
            reader.start()
            self._readers.append(reader)

    def text(self, rank: int) -> str:
        """Everything a rank has printed."""
        return "".join(self.said[rank])

    def wait_for(self, pattern: str, *, rank: int = 0, within_s: float = 120) -> None:
        """Wait until a rank has printed a line with ``pattern``."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if any(re.search(pattern, line) for line in list(self.said[rank])):
                return
            assert self.ranks[rank].poll() is None, f"ended before {pattern!r}: {self.text(rank)[-2000:]}"
            time.sleep(0.02)
        raise AssertionError(f"{pattern!r} did not come: {self.text(rank)[-2000:]}")

    def codes(self, *, within_s: float = 15) -> list[int]:
        """The exit code of every rank; all of them must end within the time that is promised."""
        deadline = time.monotonic() + within_s
        try:
            for process in self.ranks:
                process.wait(max(0.01, deadline - time.monotonic()))
        except subprocess.TimeoutExpired as late:
            everything = "\n---\n".join(self.text(rank)[-2000:] for rank in range(len(self.ranks)))
            raise AssertionError(f"a rank was still there after {within_s} s: {everything}") from late
        finally:
            self.end()
        return [process.returncode for process in self.ranks]

    def end(self) -> None:
        """Leave no process behind."""
        for process in self.ranks:
            if process.poll() is None:
                process.kill()
            process.wait()
        for reader in self._readers:
            reader.join(5)

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: list[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            lines.extend(iter(process.stdout.readline, ""))


def launch(
    *flags: str, world_size: int = 2, script: Path = TRAIN, per_rank: dict[int, dict[str, str]] | None = None
) -> Launch:
    """Start every rank without a launcher, which would end ranks that should end by themselves.

    Args:
        flags: of the trainer.
        world_size: ranks.
        script: what to run.
        per_rank: further environment variables of single ranks.
    """
    port = str(free_port())
    ranks = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "TORCH_EXTENSIONS_DIR": str(REPOSITORY / ".build" / "torch_extensions"),
            **(per_rank or {}).get(rank, {}),
        }
        ranks.append(
            subprocess.Popen(
                [sys.executable, str(script), *flags],
                cwd=REPOSITORY,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                bufsize=1,
            )
        )
    return Launch(ranks)


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def trainers_under(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks that a launcher has started."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            command = child.cmdline()
            if any(word.endswith("apr_dist/train.py") for word in command[:4]) and "RANK" in child.environ():
                found.append(child)
    return found
