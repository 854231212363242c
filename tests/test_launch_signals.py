"""Ctrl-C and SIGTERM under a launcher: one message, a saved step, and the documented exit code."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders.faults import free_port
from builders.launched import Launched
from builders.runs import REPOSITORY, TRAIN, newest_whole, verdict

from apr_dist.errors import ExitCode

if TYPE_CHECKING:
    from builders.runs import Inputs

TORCHRUN = "torch.distributed.run --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint localhost:0"
ACCELERATE = "accelerate.commands.launch --mixed_precision no --dynamo_backend no --num_machines 1"

STARTS = {
    "python": "",
    "torchrun": f"-m {TORCHRUN}",
    "accelerate launch, one process": f"-m {ACCELERATE} --num_processes 1 --cpu",
    "accelerate launch, several": f"-m {ACCELERATE} --multi_gpu --num_processes 2",
}
"""Ways to start a run, as the table of docs/exit-codes.md names them."""


def documented(start: str, column: int) -> int:
    """The exit code that the table promises for a way to start; 1 is Ctrl-C, 2 SIGTERM."""
    text = (REPOSITORY / "docs" / "exit-codes.md").read_text()
    name, comma, rest = start.partition(",")
    (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}`{comma}{rest} |")]
    return int(re.findall(r"\d+", row.split("|")[column + 1])[0])


def launched(start: str, inputs: Inputs, run: Path) -> Launched:
    words = STARTS[start].split()
    if "--multi_gpu" in words:
        words += ["--main_process_port", str(free_port())]
    sizes = ["--num-steps", "100000", "--eval-every", "5", "--early-stop.patience", "99999", "--lr", "1e-4"]
    given = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(run), *sizes]
    clean = {key: text for key, text in os.environ.items() if key not in {"RANK", "WORLD_SIZE"}}
    environment = {**clean, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return Launched([sys.executable, *words, str(TRAIN), *given], run=run, environment=environment)


@pytest.mark.parametrize(
    ("start", "number"),
    [
        ("python", signal.SIGINT),
        ("torchrun", signal.SIGTERM),
        ("accelerate launch, one process", signal.SIGINT),
        ("accelerate launch, several", signal.SIGTERM),
    ],
    ids=str,
)
def test_a_signal_is_answered_at_once_and_reported_once(
    start: str, number: signal.Signals, inputs: Inputs, tmp_path: Path
) -> None:
    """Ctrl-C reaches the launcher and its processes; SIGTERM the launcher alone."""
    with launched(start, inputs, tmp_path / "run") as found:
        found.wait_until_saved()
        if number is signal.SIGINT:
            os.killpg(found.process.pid, number)
        else:
            found.process.send_signal(number)
        said, _ = found.process.communicate(timeout=120)
    assert said.count("stopping after this step, saving; again to stop at once") == 1, said
    assert re.findall(r"error[^\n]*SIG[A-Z]+ was received and step (\d+) saved", said) == [
        str(int(newest_whole(found.run).name))  # type: ignore[union-attr]
    ], said
    ended = ExitCode.INTERRUPTED if number is signal.SIGINT else ExitCode.TERMINATED
    assert verdict(found.run)["exit_code"] == ended
    code = found.process.returncode
    column = 1 if number is signal.SIGINT else 2
    assert (code if code >= 0 else 128 - code) == documented(start, column)
