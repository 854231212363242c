"""Whatever stops one rank stops all: real processes without a launcher, each with its own exit code."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders.faults import ENDLESS, Launch, launch
from builders.runs import TRAIN, metrics, newest_whole, run_here, verdict

from apr_dist.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from builders.runs import Inputs


HANG_S = 12
"""Longer than anything a rank does at once here, however busy the machine is."""


def flags(inputs: Inputs, run_dir: Path, *more: str) -> list[str]:
    given = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(run_dir)]
    return [*given, "--lr", "1e-4", "--parallel.strategy", "ddp", *more]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def running(inputs: Inputs, run_dir: Path) -> Iterator[Launch]:
    """Two ranks in the middle of training, for as long as it takes."""
    started = launch(*flags(inputs, run_dir, *ENDLESS, "--parallel.hang-s", str(HANG_S)))
    started.wait_for(r"^step +3/")
    yield started
    started.end()


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-006")
def test_an_exception_on_one_rank_ends_the_others_with_its_code_and_name(
    inputs: Inputs, tmp_path: Path, run_dir: Path
) -> None:
    """Rank 1 finds its shards damaged when it first reads them, while rank 0 waits in a collective."""
    damaged = tmp_path / "one-rank-s-data"
    damaged.mkdir()
    for path in inputs.train.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    for shard in damaged.glob("*.bin"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(bytes(content))
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, runpy, sys\n"
        f"if os.environ['RANK'] == '1': sys.argv[sys.argv.index('--dataset') + 1] = {str(damaged)!r}\n"
        "sys.argv[0] = os.environ['TRAIN']\n"
        "runpy.run_path(os.environ['TRAIN'], run_name='__main__')\n"
    )
    both = {rank: {"TRAIN": str(TRAIN)} for rank in (0, 1)}
    started = launch(*flags(inputs, run_dir, *ENDLESS), script=script, per_rank=both)
    assert started.codes(within_s=120) == [ExitCode.DATA, ExitCode.DATA]
    assert "error on rank 1, at step 0 while training: " in started.text(1)
    assert "error of rank 1, at step 0 while training: " in started.text(0)
    assert verdict(run_dir)["facts"]["failed_rank"] == 1
    assert "Traceback" not in started.text(0) + started.text(1)


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-006")
def test_a_rank_that_is_killed_ends_the_others_and_is_named(running: Launch, run_dir: Path) -> None:
    running.ranks[1].kill()
    assert running.codes() == [ExitCode.DISTRIBUTED, -signal.SIGKILL]
    assert "[FALSIFY-APR-DIST-DISTRIBUTED-006] rank 1 is gone, last seen at step " in running.text(0)
    assert verdict(run_dir)["facts"]["failed_rank"] == 1


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-006")
def test_ranks_hear_of_the_death_of_rank_0_too(running: Launch) -> None:
    running.ranks[0].kill()
    assert running.codes() == [-signal.SIGKILL, ExitCode.DISTRIBUTED]


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-006")
def test_a_hang_names_rank_step_and_phase_and_shows_every_stack(running: Launch, run_dir: Path) -> None:
    """Rank 1 is frozen: its host answers, and nothing moves; for a part of the time, that changes nothing."""
    running.ranks[1].send_signal(signal.SIGSTOP)
    time.sleep(3)
    running.ranks[1].send_signal(signal.SIGCONT)
    running.wait_for(rf"^step +{metrics(run_dir)[-1]['step'] + 5}/")
    running.ranks[1].send_signal(signal.SIGSTOP)
    running.wait_for(f"no rank has moved for {HANG_S} s")
    running.ranks[1].send_signal(signal.SIGCONT)
    assert running.codes() == [ExitCode.DISTRIBUTED, ExitCode.DISTRIBUTED]
    said = running.text(0)
    assert "rank 1 is behind, at step " in said
    assert "while training" in said
    for rank in (0, 1):
        assert f"  rank {rank}: step " in said
        assert f"rank {rank} stands at step " in running.text(rank)
        assert "trainer.py" in running.text(rank)
    assert verdict(run_dir)["facts"]["failed_phase"] == "training"


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-004")
@pytest.mark.parametrize(
    ("number", "ranks", "times"),
    [(signal.SIGTERM, [1], 1), (signal.SIGINT, [0, 1], 2)],
    ids=["SIGTERM-to-one-rank", "SIGINT-twice-to-all"],
)
def test_a_signal_to_one_rank_or_all_saves_the_step_just_finished(
    number: signal.Signals, ranks: list[int], times: int, running: Launch, run_dir: Path
) -> None:
    for _ in range(times):  # a launcher hands on what its workers have had from the terminal already
        for rank in ranks:
            running.ranks[rank].send_signal(number)
    assert running.codes() == [128 + number, 128 + number]
    saved = newest_whole(run_dir)
    assert saved is not None
    assert int(saved.name) == metrics(run_dir)[-1]["step"] >= 3


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-006")
@pytest.mark.parametrize("line", ["^running on", "^training on"], ids=["loading", "first-evaluation"])
def test_a_signal_before_the_first_step_ends_all_ranks_with_its_code(
    line: str, inputs: Inputs, run_dir: Path
) -> None:
    started = launch(*flags(inputs, run_dir, *ENDLESS))
    started.wait_for(line)
    started.ranks[1].terminate()
    assert started.codes() == [ExitCode.TERMINATED, ExitCode.TERMINATED]


def test_a_signal_between_the_last_step_and_its_evaluation_loses_no_evaluation(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes while the evaluation after step 2 runs; resumed, the run is the straight one."""
    from apr_dist.training import evaluation  # noqa: PLC0415

    small = ("--num-steps", "4", "--eval-every", "2", "--evaluation.micro-batch-size", "1")
    given = flags(inputs, tmp_path / "run", *small)
    given[given.index("ddp")] = "single"
    straight = [str(tmp_path / "straight") if flag == str(tmp_path / "run") else flag for flag in given]
    assert run_here(*straight) == 0
    seen = []
    measured = evaluation.split_sequences

    def signalled(*given: object, **named: object) -> object:
        begun = (tmp_path / "run" / "metrics.jsonl").exists()
        if begun and len(metrics(tmp_path / "run")) == 2 and not seen:
            seen.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return measured(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation, "split_sequences", signalled)
    assert run_here(*given) == ExitCode.TERMINATED
    assert len(metrics(tmp_path / "run", "evaluation")) == 1
    assert run_here(*given, "--resume", "auto") == 0
    for kind, key in (("evaluation", "val_loss"), ("step", "train_loss")):
        ours, theirs = (metrics(tmp_path / name, kind) for name in ("run", "straight"))
        assert [(line["step"], line[key]) for line in ours] == [(line["step"], line[key]) for line in theirs]
    assert metrics(tmp_path / "run", "evaluation")[-1]["evaluation"] == 2
