"""What stops or hurts one of two ranks: a loss that is no number, by strategy, and saves cut in two."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders.broken import token_of_one_sequence, write_model_that_breaks_at
from builders.runs import metrics, newest_whole, verdict
from builders.several import HAS_COMPILER
from builders.warm_ranks import Hurt, WarmRanks

from apr_dist.apr.reader import AprReader
from apr_dist.cli import main
from apr_dist.errors import ExitCode
from apr_dist.parallel.runtime import reset_state

if TYPE_CHECKING:
    from builders.runs import Inputs

EVALUATED = 4
"""Held-out sequences that are looked at."""

needs_compiler = pytest.mark.skipif(
    not HAS_COMPILER, reason="DeepSpeed builds its CPU modules with a C++ compiler, and there is none"
)
STRATEGIES = [
    "ddp",
    "fsdp2",
    *(pytest.param(f"zero{stage}", marks=needs_compiler) for stage in (1, 2, 3)),
]
PROMISED_S = 15


def flags(inputs: Inputs, init: Path, run_dir: Path, *more: str) -> list[str]:
    given = [*inputs.data_flags(), "--init", str(init), "--run-dir", str(run_dir), "--eval-every", "1"]
    given += ["--evaluation.max-sequences", str(EVALUATED), "--evaluation.random-sequences", "0"]
    return [*given, "--target-val-loss", "0.1", "--early-stop.patience", "100000", *more]


@pytest.fixture(scope="module")
def breaking(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A model that breaks in the second step, on the one rank that reads a certain sequence; and which."""
    token, row = token_of_one_sequence(inputs, batch=1, evaluated=EVALUATED)
    path = tmp_path_factory.mktemp("breaking") / "model.apr"
    return write_model_that_breaks_at(token, inputs, path), 4 + row


def saved_bytes(run_dir: Path, step: int) -> dict[str, bytes]:
    """Weights and moments of a step folder."""
    folder = run_dir / "steps" / f"{step:06d}"
    with AprReader(folder / "checkpoint.apr") as reader:
        found = {name: bytes(reader.raw(name)) for name in reader.tensors}
    return found | {path.name: path.read_bytes() for path in folder.glob("optimizer-*")}


@pytest.mark.falsifies("INV-TRAIN-007")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loss_that_is_no_number_on_one_rank_stops_all_and_is_replayed(
    strategy: str,
    inputs: Inputs,
    breaking: tuple[Path, int],
    ranks: WarmRanks,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model, sequence = breaking
    run_dir = tmp_path / "run"
    # A rate that changes a zero, and leaves every product what it was.
    given = flags(inputs, model, run_dir, "--num-steps", "4", "--lr", "1e-23", "--warmup-steps", "9")
    ended = ranks.launch([*given, "--parallel.strategy", strategy], world_size=2)
    assert ended.codes == (ExitCode.NUMERICAL_INSTABILITY,) * 2, ended.errors
    assert "step 2, global batch 1, sequences 4 to 7: " in ended.errors[0]
    assert "error" not in ended.errors[1], "told once"
    assert [line["step"] for line in metrics(run_dir)] == [1]
    assert newest_whole(run_dir) == run_dir / "steps" / "000001"
    assert verdict(run_dir)["exit_code"] == 8
    capfd.readouterr()
    reset_state()
    assert main(["replay", str(run_dir), "--json"]) == 0
    reset_state()
    found = json.loads(capfd.readouterr().out)
    assert (found["step"], found["culprits"]) == (2, [sequence])


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-020")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_that_is_no_number_on_one_rank_is_skipped_by_all_and_changes_no_bit(
    strategy: str, inputs: Inputs, breaking: tuple[Path, int], ranks: WarmRanks, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    given = flags(inputs, breaking[0], run_dir, "--num-steps", "2", "--lr", "1e-23", "--warmup-steps", "9")
    given += ["--guards.on-nonfinite", "skip", "--checkpoint.keep-last", "9"]
    ended = ranks.launch([*given, "--parallel.strategy", strategy], world_size=2)
    assert set(ended.codes) <= {ExitCode.OK, ExitCode.VERDICT}, ended.errors
    assert len(set(ended.codes)) == 1
    assert [line["step"] for line in metrics(run_dir, "skipped")] == [2]
    assert saved_bytes(run_dir, 2) == saved_bytes(run_dir, 1)
    with AprReader(breaking[0]) as reader:
        before = {name: bytes(reader.raw(name)) for name in reader.tensors}
    assert any(saved_bytes(run_dir, 1)[name] != content for name, content in before.items())


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-006")
@pytest.mark.parametrize("background", ["--checkpoint.background", "--no-checkpoint.background"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_that_fails_on_one_rank_ends_both_and_leaves_the_one_before(
    rank: int, background: str, inputs: Inputs, ranks: WarmRanks, tmp_path: Path
) -> None:
    """What the rank writes cannot take its name, because a folder has it."""
    run_dir = tmp_path / "run"
    given = flags(inputs, inputs.pretrained, run_dir, "--lr", "1e-4", "--parallel.strategy", "fsdp2")
    given += [background, "--resume", "auto", "--resume-allow", "num_steps"]
    assert set(ranks.launch([*given, "--num-steps", "1"], world_size=2).codes) <= {0, ExitCode.VERDICT}
    trap = run_dir / "steps" / "000002" / f"optimizer-{rank:05d}-of-00002.safetensors"
    trap.mkdir(parents=True)
    ended = ranks.launch([*given, "--num-steps", "4"], world_size=2)
    assert ended.codes == (ExitCode.OUTPUT,) * 2, ended.errors
    assert trap.name in "".join(ended.errors)
    assert newest_whole(run_dir) == run_dir / "steps" / "000001"
    assert verdict(run_dir)["exit_code"] == ExitCode.OUTPUT


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-006", "FALSIFY-APR-DIST-DISTRIBUTED-004")
@pytest.mark.parametrize("background", ["--checkpoint.background", "--no-checkpoint.background"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_as_a_save_begins_ends_both_and_leaves_a_whole_folder(
    number: signal.Signals, rank: int, background: str, inputs: Inputs, ranks: WarmRanks, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    endless = ("--num-steps", "100000", "--lr", "1e-6", "--parallel.strategy", "fsdp2", background)
    begun = Hurt(number=number, ranks=(rank,), after=str(run_dir / "steps" / "000003"))
    ended = ranks.launch(flags(inputs, inputs.pretrained, run_dir, *endless), world_size=2, hurt=begun)
    killed = number == signal.SIGKILL
    wanted = [int(ExitCode.DISTRIBUTED) if killed else 128 + number] * 2
    if killed:
        wanted[rank] = -number
    assert ended.codes == tuple(wanted), ended.errors
    assert ended.after_s is not None
    assert ended.after_s < PROMISED_S
    whole = newest_whole(run_dir)
    assert whole is not None
    assert int(whole.name) >= 2
    if not killed:
        assert int(whole.name) == metrics(run_dir)[-1]["step"] >= 3
