"""Sharded training with two real processes: what lies where, the same numbers, the same files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from builders.ranks import CASES, drawn, take_steps
from builders.runs import REPOSITORY, metrics, verdict
from builders.sessions import architecture_of

from apr_dist.apr.reader import AprReader
from apr_dist.choices import Strategy
from apr_dist.parallel.runtime import reset_state

if TYPE_CHECKING:
    from builders.runs import Inputs
    from builders.warm_ranks import WarmRanks

ELEMENTS = 107_072
"""Parameters of the tiny pretrained model, the tied embedding counted once."""

HALVES = [ELEMENTS // 2, ELEMENTS // 2]

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None,
    reason="DeepSpeed builds its CPU communication module with a C++ compiler, and there is none",
)


@pytest.fixture(autouse=True)
def kept_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's CPU module is built once for this checkout, by this environment's own build tools."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(REPOSITORY / ".build" / "torch_extensions"))


def train(ranks: WarmRanks, inputs: Inputs, run_dir: Path, world_size: int, *flags: str) -> Path:
    given = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(run_dir)]
    given += ["--batch-size", "8", "--micro-batch-size", "2", "--num-steps", "4", "--eval-every", "2"]
    given += ["--lr", "1e-3", "--warmup-steps", "1", "--checkpoint.keep-last", "9", *flags]
    ended = ranks.launch(given, world_size=world_size)
    assert set(ended.codes) == {0}, ended.errors
    return run_dir


@pytest.fixture(scope="module")
def alone(inputs: Inputs, ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in one process: four micro-batches a step, saved after two and after four."""
    return train(ranks, inputs, tmp_path_factory.mktemp("alone") / "run", 1)


@pytest.fixture(scope="module")
def fsdp2(inputs: Inputs, ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run under FSDP2 on two processes: two micro-batches a step and rank."""
    run_dir = tmp_path_factory.mktemp("fsdp2") / "run"
    return train(ranks, inputs, run_dir, 2, "--parallel.strategy", "fsdp2")


def assert_same_numbers(one: Path, other: Path, *, first: int = 0, loss: float = 1e-6) -> None:
    steps, others = metrics(one)[first:], metrics(other)[first:]
    assert [line["step"] for line in others] == [line["step"] for line in steps]
    for line, same in zip(steps, others, strict=True):
        assert same["train_loss"] == pytest.approx(line["train_loss"], rel=loss)
        assert same["grad_norm"] == pytest.approx(line["grad_norm"], rel=10 * loss)
    ends = [metrics(run, "evaluation")[-1]["val_loss"] for run in (one, other)]
    assert ends[1] == pytest.approx(ends[0], rel=loss)


def assert_same_model(one: Path, other: Path, *, within: float) -> None:
    with AprReader(one) as ours, AprReader(other) as theirs:
        assert ours.tensors.keys() == theirs.tensors.keys()
        for name in ours.tensors:
            np.testing.assert_allclose(ours.float32(name), theirs.float32(name), atol=within, err_msg=name)


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-002")
def test_fsdp2_halves_the_model_and_changes_no_number(alone: Path, fsdp2: Path) -> None:
    facts = verdict(fsdp2)["facts"]
    assert (facts["strategy"], facts["world_size"]) == ("fsdp2", 2)
    assert (facts["parameter_elements"], facts["shard_elements"]) == (ELEMENTS, HALVES)
    assert verdict(alone)["facts"]["shard_elements"] == [ELEMENTS]
    assert_same_numbers(alone, fsdp2)
    assert_same_model(alone / "checkpoint.apr", fsdp2 / "checkpoint.apr", within=2e-5)


@needs_compiler
def test_zero2_goes_on_from_what_fsdp2_saved(
    alone: Path, fsdp2: Path, inputs: Inputs, ranks: WarmRanks, tmp_path: Path
) -> None:
    resume = ("--resume", str(fsdp2 / "steps" / "000002"))
    run_dir = train(ranks, inputs, tmp_path / "run", 2, "--parallel.strategy", "zero2", *resume)
    facts = verdict(run_dir)["facts"]
    assert (facts["strategy"], facts["zero_stage"]) == ("zero2", 2)
    assert facts["shard_elements"] == [ELEMENTS, ELEMENTS]
    assert facts["optimizer_elements"] == HALVES
    steps = {line["step"]: line for line in metrics(run_dir)}
    assert sorted(steps) == [1, 2, 3, 4]
    assert [steps[1], steps[2]] == metrics(fsdp2)[:2], "those of the run it goes on from"
    for line in metrics(alone)[2:]:
        assert steps[line["step"]]["train_loss"] == pytest.approx(line["train_loss"], rel=1e-5)
        assert steps[line["step"]]["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-5)
    assert_same_model(alone / "checkpoint.apr", run_dir / "checkpoint.apr", within=2e-5)


@pytest.fixture(scope="module")
def reports(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks reported of every strategy, all in one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["TORCH_EXTENSIONS_DIR"] = str(REPOSITORY / ".build" / "torch_extensions")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    script = [str(Path(__file__).parent / "builders" / "ranks.py"), str(inputs.pretrained), str(folder)]
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        script.append("--no-deepspeed")
    done = subprocess.run(
        [*launch, *script], capture_output=True, text=True, timeout=500, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"report-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What a session in this process leaves of its processes' state."""
    yield
    reset_state()


def cases_of(report: dict[str, Any]) -> list[tuple[str, int, dict[str, Any]]]:
    names = ((f"{strategy}-{size}", size) for strategy, size in CASES)
    return [(name, size, report[name]) for name, size in names if name in report]


def test_every_strategy_holds_its_share_and_takes_the_same_steps(
    reports: list[dict[str, Any]], inputs: Inputs, tmp_path: Path
) -> None:
    wanted = take_steps(inputs.pretrained, Strategy.SINGLE, 1, tmp_path)
    for report in reports:
        assert len(cases_of(report)) >= 4
        for name, size, found in cases_of(report):
            assert found["strategy"] == name.rpartition("-")[0]
            assert found["loaded"] == wanted["loaded"], name
            assert found["shard_elements"] == [ELEMENTS // size] * 2, name
            assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-6), name
            assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-5), name
            assert_same_model(Path(wanted["saved"]), Path(found["saved"]), within=2e-5)


def test_sharded_blocks_compile_to_one_graph_with_any_checkpointing_and_change_no_number(
    reports: list[dict[str, Any]],
) -> None:
    for report in reports:
        assert {"ddp", "fsdp2"} <= set(report["compiled"])
        for strategy, found in report["compiled"].items():
            plain = found.pop("as it is")["steps"]
            assert set(found) == {"off", "full", "selective"}
            for mode, run in found.items():
                assert run["breaks"] == 0, (strategy, mode)
                assert run["graphs"] == [1, 1, 1, 1], (strategy, mode)
                for step, expected in zip(run["steps"], plain, strict=True):
                    assert step == pytest.approx(expected, rel=1e-5), (strategy, mode)


def test_gradients_under_ddp_lie_in_what_they_are_sent_from(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        memories, gradients = report["gradient memories"]
        assert memories < gradients / 4, "each has memory of its own, beside the bucket it was sent from"


@pytest.mark.falsifies("INV-TRAIN-007")
def test_a_gradient_that_is_not_finite_touches_no_weight_under_any_strategy(
    reports: list[dict[str, Any]],
) -> None:
    for report in reports:
        for name, _, found in cases_of(report):
            assert (found["refused"], found["untouched"]) == ("INV-TRAIN-007", True), name


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-020")
def test_a_skipped_step_leaves_weights_and_gradients_as_if_it_had_not_been(
    reports: list[dict[str, Any]], inputs: Inputs, tmp_path: Path
) -> None:
    found = [take_steps(inputs.pretrained, Strategy.SINGLE, 1, tmp_path)["skipped"]]
    found += [case["skipped"] for report in reports for _, _, case in cases_of(report) if "skipped" in case]
    assert len(found) >= 3
    for one in found:
        assert (one["untouched"], one["skipped"], one["moved"]) == (True, 2, True)
        first, second = one["norms"]
        assert first in {"nan", "inf"}
        assert one["norm_when_taken"] == pytest.approx(second, rel=1e-6)


def test_a_save_that_rank_0_refuses_is_refused_on_every_rank(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        for name, _, found in cases_of(report):
            assert found.get("kept_the_first"), name


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-005", "FALSIFY-APR-DIST-TRAINER-001")
def test_one_altered_element_of_one_shard_is_named_on_every_rank(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert "FALSIFY-APR-DIST-TRAINER-001" in report["damage"]
        assert "model.layers.1.mlp.up_proj.weight" in report["damage"]


def test_weights_from_scratch_do_not_depend_on_the_sharding(
    reports: list[dict[str, Any]], inputs: Inputs
) -> None:
    alone = drawn(architecture_of(inputs.pretrained), Strategy.SINGLE, 1)
    assert {report["drawn"] for report in reports} == {alone}
