"""The Slurm recipe, run as Slurm runs it: its signals, its step, its queue."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders.faults import free_port
from builders.launched import Launched
from builders.runs import REPOSITORY, newest_whole, verdict

from apr_dist.errors import ExitCode

if TYPE_CHECKING:
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


class Job(Launched):
    """The recipe as a batch job of one machine and two CPU processes."""

    def __init__(self, inputs: Inputs, folder: Path, *more: str) -> None:
        self.folder = folder
        for name, text in COMMANDS.items():
            (folder / name).write_text("#!/usr/bin/env bash\n" + text)
            (folder / name).chmod(0o755)
        clean = {key: text for key, text in os.environ.items() if key not in {"RANK", "WORLD_SIZE"}}
        path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        slurm = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost"}
        given = {"INIT": str(inputs.pretrained), "DATA": str(inputs.train.parent)}
        given |= {"RUN_DIR": str(folder / "run"), "STRATEGY": "ddp", "PROCESSES": "2"}
        given |= {"PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}
        # What torchrun would wait without the recipe's own limit, so that a slow step takes few seconds.
        default = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1", "SLURM_PLAYED": str(folder), "PATH": path}
        flags = [*inputs.data_flags(), "--lr", "1e-4", "--parallel.precision", "f32", *more]
        environment = {**clean, **slurm, **given, **default}
        super().__init__(["bash", str(RECIPE), *flags], run=folder / "run", environment=environment)

    def log(self) -> list[str]:
        """What Slurm was asked for."""
        file = self.folder / "log"
        return file.read_text().splitlines() if file.exists() else []


def test_at_the_time_limit_a_slow_step_is_saved_and_the_job_queued_again(
    inputs: Inputs, tmp_path: Path
) -> None:
    endless = ("--num-steps", "100000", "--eval-every", "5", "--early-stop.patience", "99999")
    with Job(inputs, tmp_path, *endless) as job:
        before = job.wait_until_saved()
        slow = job.ranks()[1]
        slow.suspend()
        job.process.send_signal(signal.SIGTERM)
        time.sleep(4)
        slow.resume()
        said, _ = job.process.communicate(timeout=120)
    assert job.log() == ["scancel --signal=TERM 77.0", "scontrol requeue 77"], said
    after = newest_whole(job.run)
    assert after is not None
    assert int(after.name) > int(before.name), said
    assert f"SIGTERM was received and step {int(after.name)} saved" in said
    assert verdict(job.run)["exit_code"] == ExitCode.TERMINATED
    assert job.process.returncode == 1


@pytest.mark.parametrize("more", [("--num-steps", "2"), ("--num-steps", "-1")])
def test_a_job_that_ends_by_itself_is_not_queued_again(
    more: tuple[str, ...], inputs: Inputs, tmp_path: Path
) -> None:
    with Job(inputs, tmp_path, *more) as job:
        said, _ = job.process.communicate(timeout=150)
    assert (job.process.returncode == 0) is (more[1] == "2"), said
    assert job.log() == []
