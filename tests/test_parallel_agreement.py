"""All ranks run the same run to its end: equal settings, data and init; uneven evaluations; a lost rank 0."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders.runs import metrics, run_here, verdict
from builders.several import HAS_COMPILER
from builders.warm_ranks import Hurt, WarmRanks

from apr_dist.data.loader import EvaluationLoader
from apr_dist.data.manifest import Manifest
from apr_dist.errors import ExitCode

if TYPE_CHECKING:
    from builders.runs import Inputs

needs_compiler = pytest.mark.skipif(
    not HAS_COMPILER, reason="DeepSpeed builds its CPU modules with a C++ compiler, and there is none"
)


def flags(inputs: Inputs, run_dir: Path, *more: str) -> list[str]:
    given = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(run_dir)]
    given += ["--num-steps", "2", "--eval-every", "2", "--target-val-loss", "0.1"]
    return [*given, "--evaluation.random-sequences", "0", *more]


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-024")
@pytest.mark.parametrize(
    ("flag", "value", "key"),
    [
        ("--lr", "2e-3", "lr"),
        ("--seed", "5", "seed"),
        ("--parallel.precision", "bf16", "parallel.precision"),
        ("--optimizer.weight-decay", "0.3", "optimizer.weight_decay"),
        ("--parallel.strategy", "fsdp2", "parallel.strategy"),
        ("--compute.z-loss", "0.1", "compute.z_loss"),
        ("--evaluation.max-sequences", "3", "evaluation.max_sequences"),
    ],
)
def test_a_rank_with_other_settings_stops_all_before_the_first_step(
    flag: str, value: str, key: str, inputs: Inputs, ranks: WarmRanks, tmp_path: Path
) -> None:
    ended = ranks.launch(flags(inputs, tmp_path / "run"), world_size=2, own={1: {flag: value}})
    assert ended.codes == (ExitCode.DISTRIBUTED,) * 2, ended.errors
    assert "[FALSIFY-APR-DIST-DISTRIBUTED-024]" in ended.errors[0]
    assert "rank 1 on host" in ended.errors[0]
    assert f"{key} is {value.replace('2e-3', '0.002')} there and " in ended.errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-024")
def test_a_rank_with_other_data_or_another_init_stops_all(
    inputs: Inputs, ranks: WarmRanks, tmp_path: Path
) -> None:
    given = flags(inputs, tmp_path / "run")
    swapped = {"--dataset": str(inputs.validation), "--val-dataset": str(inputs.validation)}
    ended = ranks.launch(given, world_size=2, own={1: swapped})
    assert ended.codes == (ExitCode.DISTRIBUTED,) * 2, ended.errors
    assert "training data is " in ended.errors[0]
    assert not list((tmp_path / "run").iterdir())
    (tmp_path / "run").rmdir()
    other = tmp_path / "other.apr"
    assert run_here(*flags(inputs, tmp_path / "trained", "--lr", "1e-2")) == 0
    shutil.copyfile(tmp_path / "trained" / "checkpoint.apr", other)
    ended = ranks.launch(given, world_size=2, own={1: {"--init": str(other)}})
    assert ended.codes == (ExitCode.DISTRIBUTED,) * 2, ended.errors
    assert "init file is sha256:" in ended.errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-024")
def test_a_copy_of_the_same_inputs_elsewhere_is_the_same_run(
    inputs: Inputs, ranks: WarmRanks, tmp_path: Path
) -> None:
    copies = {
        "--dataset": shutil.copytree(inputs.train, tmp_path / "local" / "train"),
        "--val-dataset": shutil.copytree(inputs.validation, tmp_path / "local" / "validation"),
        "--init": shutil.copyfile(inputs.pretrained, tmp_path / "local" / "copy.apr"),
    }
    own = {flag: str(path) for flag, path in copies.items()}
    given = flags(inputs, tmp_path / "run", "--parallel.cpu-threads", "1")
    ended = ranks.launch(given, world_size=2, own={1: {**own, "--loader.prefetch-batches": "0"}})
    assert ended.codes == (0, 0), ended.errors
    assert verdict(tmp_path / "run")["facts"]["strategy"] == "ddp"


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-025")
@pytest.mark.parametrize(
    ("strategy", "world", "sequences", "micro"),
    [
        ("ddp", 3, 4, 1),
        ("ddp", 2, 3, 1),
        ("fsdp2", 2, 1, 1),
        ("fsdp2", 3, 7, 2),
        pytest.param("zero1", 2, 3, 1, marks=needs_compiler),
        pytest.param("zero3", 2, 1, 2, marks=needs_compiler),
    ],
)
def test_an_evaluation_with_less_than_a_sequence_for_each_rank_counts_every_sequence_once(
    strategy: str, world: int, sequences: int, micro: int, inputs: Inputs, ranks: WarmRanks, tmp_path: Path
) -> None:
    sample = ("--evaluation.max-sequences", str(sequences), "--evaluation.micro-batch-size", str(micro))
    batch = ("--batch-size", "12", "--num-steps", "0")
    alone = tmp_path / "alone"
    assert run_here(*flags(inputs, alone, *sample, *batch)) == 0
    run_dir = tmp_path / "run"
    given = flags(inputs, run_dir, *sample, *batch, "--parallel.strategy", strategy)
    ended = ranks.launch(given, world_size=world)
    assert ended.codes == (0,) * world, ended.errors
    assert verdict(run_dir)["facts"]["strategy"] == strategy
    (one,), (several,) = metrics(alone, "evaluation"), metrics(run_dir, "evaluation")
    assert several["tokens"] == one["tokens"] == sequences * 32
    assert several["val_loss"] == pytest.approx(one["val_loss"], abs=1e-6)


@pytest.mark.parametrize(("world", "micro", "count"), [(3, 4, 163), (2, 1, 3), (4, 2, 9), (5, 3, 16)])
def test_ranks_share_an_evaluation_without_overlap(
    world: int, micro: int, count: int, inputs: Inputs
) -> None:
    held_out, rows = Manifest.load(inputs.validation), []
    for rank in range(world):
        loader = EvaluationLoader(
            held_out, seq_length=32, micro_batch=micro, rank=rank, world_size=world, max_sequences=count
        )
        batches = list(loader)
        assert len(batches) == len(loader)
        rows += [tuple(row.tolist()) for batch in batches for row in batch]
        loader.close()
    whole = EvaluationLoader(held_out, seq_length=32, micro_batch=count, max_sequences=count)
    assert sorted(rows) == sorted(tuple(row.tolist()) for batch in whole for row in batch)
    whole.close()


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-006")
def test_a_killed_rank_0_leaves_a_verdict_by_a_rank_that_saw_it(
    inputs: Inputs, ranks: WarmRanks, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    long = ("--num-steps", "4000", "--eval-every", "2", "--early-stop.patience", "4000")
    marker = run_dir / "steps" / "000002" / "state.json"
    hurt = Hurt(number=signal.SIGKILL, ranks=(0,), after=str(marker))
    ended = ranks.launch(
        flags(inputs, run_dir, *long, "--checkpoint.keep-last", "9"), world_size=2, hurt=hurt
    )
    assert ended.codes[1] == ExitCode.DISTRIBUTED, ended.errors
    said = verdict(run_dir)
    assert (said["status"], said["exit_code"]) == ("ABORTED", ExitCode.DISTRIBUTED)
    assert said["facts"]["failed_rank"] == 0
    assert "rank 0 is gone" in said["detail"]
    assert json.loads((run_dir / "run.json").read_text())["run"]
