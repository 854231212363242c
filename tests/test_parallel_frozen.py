"""A frozen parameter trains with the others, is saved with them and resumes exactly, under every engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from builders.frozen_ranks import HALF, STEPS, STRATEGIES, is_frozen, make_runs
from builders.models import tiny_decoder
from builders.runs import metrics, run_here, verdict
from builders.several import HAS_COMPILER
from conftest import shared_folder
from safetensors import safe_open

from apr_dist.apr.reader import AprReader
from apr_dist.errors import ExitCode, WeightsRefused
from apr_dist.training.optimizer import build_optimizer

if TYPE_CHECKING:
    from builders.runs import Inputs

CASES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name.startswith("zero") and not HAS_COMPILER,
            reason="DeepSpeed builds its CPU modules with a C++ compiler, and there is none",
        ),
    )
    for name in STRATEGIES
]


@pytest.fixture(scope="module")
def runs(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(inputs, shared_folder(tmp_path_factory) / "frozen")


def weights(path: Path) -> dict[str, np.ndarray]:
    with AprReader(path) as reader:
        return {name: np.array(reader.float32(name)) for name in reader.tensors}


def last_folder(run: Path) -> Path:
    return run / "steps" / f"{STEPS:06d}"


@pytest.mark.parametrize("name", CASES)
def test_frozen_weights_stay_and_the_others_are_trained_as_by_one_process(
    name: str, runs: Path, inputs: Inputs
) -> None:
    before, after = weights(inputs.pretrained), weights(last_folder(runs / name) / "checkpoint.apr")
    alone = weights(last_folder(runs / "single") / "checkpoint.apr")
    assert before.keys() == after.keys()
    assert 0 < sum(map(is_frozen, before)) < len(before)
    for tensor, values in before.items():
        assert np.array_equal(after[tensor], values) == is_frozen(tensor), tensor
        assert np.allclose(after[tensor], alone[tensor], atol=2e-5), tensor
    steps, alone_steps = metrics(runs / name), metrics(runs / "single")
    for line, other in zip(steps, alone_steps, strict=True):
        assert line["train_loss"] == pytest.approx(other["train_loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_moments_of_trained_parameters_alone_are_saved(name: str, runs: Path, inputs: Inputs) -> None:
    held = set()
    for path in last_folder(runs / name).glob("optimizer-*.safetensors"):
        with safe_open(path, framework="np") as file:
            held |= {key for key in file.keys() if not key.startswith("random.")}  # noqa: SIM118
    trained = [tensor for tensor in weights(inputs.pretrained) if not is_frozen(tensor)]
    assert held == {f"{tensor}.{key}" for tensor in trained for key in ("exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_ends_with_the_very_bits(name: str, runs: Path) -> None:
    whole, resumed = runs / name, runs / f"{name}-resumed"
    assert [line["step"] for line in metrics(resumed)] == list(range(1, STEPS + 1))
    for one, other in zip(metrics(whole), metrics(resumed), strict=True):
        assert (one["train_loss"], one["grad_norm"]) == (other["train_loss"], other["grad_norm"])
    found, expected = (weights(last_folder(run) / "checkpoint.apr") for run in (resumed, whole))
    assert all(np.array_equal(found[tensor], values) for tensor, values in expected.items())
    names = sorted(path.name for path in last_folder(whole).glob("optimizer*"))
    assert names
    for file in names:
        assert (last_folder(resumed) / file).read_bytes() == (last_folder(whole) / file).read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_the_strategy_that_ran_is_the_one_that_was_asked_for(name: str, runs: Path) -> None:
    world, strategy = STRATEGIES[name]
    facts = verdict(runs / name)["facts"]
    assert (facts["strategy"], facts["world_size"]) == (strategy, world)


def test_a_state_of_fewer_trained_parameters_is_not_resumed(
    runs: Path, inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(tmp_path / "run")]
    flags += [
        "--num-steps",
        str(STEPS),
        "--eval-every",
        str(HALF),
        "--lr",
        "1e-3",
        "--warmup-steps",
        "1",
    ]
    flags += ["--micro-batch-size", "2", "--resume", str(runs / "single" / "steps" / f"{HALF:06d}")]
    assert run_here(*flags) == ExitCode.MODEL_FILE
    said = capfd.readouterr().err
    assert "elements of model.embed_tokens.weight.exp_avg are in no file" in said


@pytest.mark.parametrize("trained", ["norm.weight", "down_proj.weight"])
def test_vectors_alone_or_matrices_alone_are_trained(trained: str) -> None:
    model = tiny_decoder()
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.endswith(trained))
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0 if "norm" in trained else 0.1]


def test_a_model_that_is_frozen_whole_is_refused() -> None:
    model = tiny_decoder().requires_grad_(False)
    with pytest.raises(WeightsRefused, match="every parameter of the model is frozen"):
        build_optimizer(model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
