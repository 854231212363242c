"""The Slurm recipe, run as Slurm runs it: its signals, its step, its queue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders.faults import free_port, trainers_under
from builders.runs import REPOSITORY, newest_whole, verdict

from apr_dist.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psutil
    from builders.runs import Inputs

RECIPE = REPOSITORY / "launch" / "slurm.sbatch"

COMMANDS = {
    # Runs the step. Like Slurm's own, it kills the step when it is sent SIGTERM itself.
    "srun": """\
        while [[ "$1" == --* ]]; do shift; done
        "$@" & echo $! > "$SLURM_PLAYED/step"
        trap 'kill -KILL -- $(cat "$SLURM_PLAYED/step")' TERM
        wait $!
        """,
    # Sends the signal to every process of the step.
    "scancel": """\
        echo "scancel $*" >> "$SLURM_PLAYED/log"
        [ "$2" = "$SLURM_JOB_ID.0" ] || exit 1
        step=$(cat "$SLURM_PLAYED/step")
        kill -s "${1#--signal=}" "$step" $(pgrep -P "$step")
        """,
    "scontrol": """\
        if [ "$1" = show ]; then echo localhost; else echo "scontrol $*" >> "$SLURM_PLAYED/log"; fi
        """,
}
"""Slurm's commands as far as the recipe uses them, with what its manual says they do."""


class Job:
    """The recipe as a batch job of one machine and two CPU processes."""

    def __init__(self, inputs: Inputs, folder: Path, *more: str) -> None:
        self.folder, self.run = folder, folder / "run"
        for name, text in COMMANDS.items():
            (folder / name).write_text("#!/usr/bin/env bash\n" + text)
            (folder / name).chmod(0o755)
        clean = {key: text for key, text in os.environ.items() if key not in {"RANK", "WORLD_SIZE"}}
        path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        slurm = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost"}
        given = {"INIT": str(inputs.pretrained), "DATA": str(inputs.train.parent), "RUN_DIR": str(self.run)}
        given |= {"STRATEGY": "ddp", "PROCESSES": "2", "PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}
        # What torchrun would wait without the recipe's own limit, so that a slow step takes few seconds.
        default = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1", "SLURM_PLAYED": str(folder), "PATH": path}
        flags = [*inputs.data_flags(), "--lr", "1e-4", "--parallel.precision", "f32", *more]
        self.process = subprocess.Popen(
            ["bash", str(RECIPE), *flags],
            cwd=REPOSITORY,
            env={**clean, **slurm, **given, **default},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ranks(self) -> list[psutil.Process]:
        """The trainers, by rank."""
        return sorted(trainers_under(self.process), key=lambda one: one.environ().get("RANK", ""))

    def wait_until_saved(self) -> None:
        deadline = time.monotonic() + 150
        while newest_whole(self.run) is None:
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, "nothing was saved"
            time.sleep(0.05)

    def log(self) -> list[str]:
        """What Slurm was asked for."""
        file = self.folder / "log"
        return file.read_text().splitlines() if file.exists() else []

    def end(self) -> None:
        for rank in self.ranks() if self.process.poll() is None else []:
            rank.kill()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    """Jobs of a test, none of which outlives it."""
    started: list[Job] = []
    yield started
    for job in started:
        job.end()


def test_at_the_time_limit_a_slow_step_is_saved_and_the_job_queued_again(
    jobs: list[Job], inputs: Inputs, tmp_path: Path
) -> None:
    endless = ("--num-steps", "100000", "--eval-every", "5", "--early-stop.patience", "99999")
    job = Job(inputs, tmp_path, *endless)
    jobs.append(job)
    job.wait_until_saved()
    slow = job.ranks()[1]
    slow.suspend()
    before = newest_whole(job.run)
    job.process.send_signal(signal.SIGTERM)
    time.sleep(4)
    slow.resume()
    said, _ = job.process.communicate(timeout=120)
    assert job.log() == ["scancel --signal=TERM 77.0", "scontrol requeue 77"], said
    after = newest_whole(job.run)
    assert before is not None
    assert after is not None
    assert int(after.name) > int(before.name), said
    assert f"SIGTERM was received and step {int(after.name)} saved" in said
    assert verdict(job.run)["exit_code"] == ExitCode.TERMINATED
    assert job.process.returncode == 1


@pytest.mark.parametrize("more", [("--num-steps", "2"), ("--num-steps", "-1")])
def test_a_job_that_ends_by_itself_is_not_queued_again(
    more: tuple[str, ...], jobs: list[Job], inputs: Inputs, tmp_path: Path
) -> None:
    job = Job(inputs, tmp_path, *more)
    jobs.append(job)
    said, _ = job.process.communicate(timeout=150)
    assert (job.process.returncode == 0) is (more[1] == "2"), said
    assert job.log() == []
