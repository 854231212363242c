"""A run of two ranks looked at again: replay finds what it recorded, a profile takes the same steps."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders.runs import REPOSITORY, metrics, verdict, whole_folders
from builders.warm_ranks import WarmRanks

from apr_dist.cli import main
from apr_dist.errors import ExitCode
from apr_dist.parallel.runtime import reset_state

if TYPE_CHECKING:
    from builders.runs import Inputs

STEPS, EVERY = 5, 2
"""Steps of a run, and how many lie between its step folders."""

SPIKES = ("--guards.on-spike", "skip", "--guards.spike-window", "2", "--guards.spike-factor", "1.000001")
FSDP2 = ("--parallel.strategy", "fsdp2", "--parallel.offload", "optimizer+parameters")
HSDP = ("--parallel.strategy", "hsdp", *SPIKES, "--parallel.shard-size")
RUNS = {
    "fsdp2": (*FSDP2, "--loader.documents", "isolate"),
    "hsdp-1": (*HSDP, "1"),
    "hsdp-2": (*HSDP, "2"),
}
"""Name to flags; nearly every rise of the norm of those with a guard is a spike."""


def flags(inputs: Inputs, name: str, run_dir: Path) -> list[str]:
    given = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(run_dir)]
    given += ["--micro-batch-size", "1", "--lr", "1e-3", "--warmup-steps", "1"]
    return [*given, "--target-val-loss", "0.1", *RUNS[name]]


@pytest.fixture(scope="module", params=RUNS)
def trained(
    request: pytest.FixtureRequest,
    inputs: Inputs,
    ranks: WarmRanks,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path]:
    """Name and folder of a finished run."""
    name, run_dir = request.param, tmp_path_factory.mktemp("trained") / "run"
    given = [*flags(inputs, name, run_dir), "--num-steps", str(STEPS), "--eval-every", str(EVERY)]
    ended = ranks.launch([*given, "--checkpoint.keep-last", "9"], world_size=2)
    assert set(ended.codes) == {0}, ended.errors
    return name, run_dir


def test_replay_finds_the_loss_and_norm_that_a_sharded_run_recorded(
    trained: tuple[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    name, run_dir = trained
    facts = verdict(run_dir)["facts"]
    assert (facts["strategy"], facts["world_size"]) == (name.partition("-")[0], 2)
    lines = {line["step"]: line for kind in ("step", "skipped") for line in metrics(run_dir, kind)}
    assert sorted(lines) == list(range(1, STEPS + 1))
    assert bool(metrics(run_dir, "skipped")) == name.startswith("hsdp")
    saved = [int(folder.name) for folder in whole_folders(run_dir)]
    for step, line in lines.items():
        capfd.readouterr()
        reset_state()
        assert main(["replay", str(run_dir), "--step", str(step), "--json"]) == 0
        found = json.loads(capfd.readouterr().out)
        assert found["redone"] == step - 1 - max((one for one in saved if one < step), default=0)
        for figure, recorded in (("loss", "train_loss"), ("grad_norm", "grad_norm")):
            assert found[figure] == pytest.approx(line[recorded], rel=1e-5), (step, figure)
    reset_state()


def profile(inputs: Inputs, name: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The verb under torchrun, with two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "-m", "apr_dist", "profile"]
    return subprocess.run(
        [*command, *flags(inputs, name, folder), "--steps", "2", *more],
        cwd=REPOSITORY,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("name", RUNS)
def test_a_profile_of_two_ranks_names_the_strategy_that_ran(
    name: str, inputs: Inputs, tmp_path: Path
) -> None:
    folder = tmp_path / "profile"
    done = profile(inputs, name, folder)
    assert done.returncode == 0, done.stderr
    page = (folder / "summary.md").read_text()
    assert done.stdout.count(page) == 1, "told once"
    assert f"as {name.partition('-')[0]} over 2 process(es), f32" in page
    assert ("documents isolated" in page) == (name == "fsdp2")
    assert sorted(path.name for path in folder.iterdir()) == ["summary.md", "trace.json"]


def test_a_profile_that_is_refused_ends_both_ranks_and_says_so_once(inputs: Inputs, tmp_path: Path) -> None:
    done = profile(inputs, "fsdp2", tmp_path / "profile", "--seq-length", "257")
    assert done.returncode != 0
    assert done.stderr.count("seq_length 257 is more than the model's 256 positions") == 1
    # torchrun stops the second rank as soon as it sees that the first has ended.
    codes = [int(code) for code in re.findall(r"exitcode  : (-?\d+)", done.stderr)]
    assert len(codes) == 2
    assert int(ExitCode.USAGE) in codes
    assert set(codes) <= {int(ExitCode.USAGE), -signal.SIGTERM}
    assert not (tmp_path / "profile").exists()
