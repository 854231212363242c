"""A launcher and its trainers as processes of a test, none of which outlives it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from builders.faults import trainers_under
from builders.runs import REPOSITORY, newest_whole


class Launched:
    """A running launcher; left with ``with``, it and its trainers are gone.

    Args:
        command: the launcher's words.
        run: the run folder of its trainers.
        environment: all of it.
    """

    def __init__(self, command: Sequence[str], *, run: Path, environment: Mapping[str, str]) -> None:
        self.run = run
        self.process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def ranks(self) -> list[psutil.Process]:
        """The trainers, by rank."""
        return sorted(trainers_under(self.process), key=lambda one: one.environ().get("RANK", ""))

    def wait_until_saved(self) -> Path:
        """The newest step folder, once there is one."""
        deadline = time.monotonic() + 150
        while (found := newest_whole(self.run)) is None:
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, "nothing was saved"
            time.sleep(0.05)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for rank in self.ranks() if self.process.poll() is None else []:
            rank.kill()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
