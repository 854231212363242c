"""What a plan says of the rungs of the memory ladder is what a traced step holds, and what fits is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from builders.runs import run_here

from apr_dist.cli import main
from apr_dist.config.reading import parse_command_line
from apr_dist.config.text import load_config
from apr_dist.errors import ExitCode, UsageError
from apr_dist.gates.host_memory import check_host_memory, host_bytes
from apr_dist.model.config import PRESETS
from apr_dist.parallel.storage import Storage
from apr_dist.parallel.strategy import named
from apr_dist.planning import plan
from apr_dist.planning.plan import Rate, make_plan
from apr_dist.planning.state import State, shards
from apr_dist.planning.tracing import trace

if TYPE_CHECKING:
    from builders.runs import Inputs

GIB = 1 << 30
CARD = ["--synthetic", "--parallel.precision", "bf16", "--device", "cuda", "--no-checkpoint.background"]
CARD += ["--micro-batch-size", "1", "--seq-length", "2048"]

SPLIT, BF16 = ("--memory.weights", "split"), ("--memory.weights", "bf16")
HALVED = ("--memory.gradients", "bf16", "--optimizer.state-bits", "8")
KEPT, LEAVING = (("--compute.activation-checkpointing", one) for one in ("full", "full-offload"))
OFFLOAD = ("--parallel.offload", "optimizer")

RUNGS: dict[str, tuple[str, ...]] = {
    "split": (*SPLIT, *KEPT),
    "bf16": (*BF16, *HALVED, *KEPT),
    "offloaded": (*SPLIT, *HALVED, *LEAVING, *OFFLOAD),
}


@pytest.fixture(autouse=True)
def _own_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the loss that is traced, whatever is installed."""
    monkeypatch.setattr(plan, "_has_liger", lambda: False)


TRACED: dict[str, tuple[tuple[str, ...], bool, int]] = {
    "split": (RUNGS["split"], True, 1),
    "bf16": (RUNGS["bf16"], True, 1),
    "offloaded": (RUNGS["offloaded"], True, 1),
    "offloaded, untied": (RUNGS["offloaded"], False, 1),
    "fsdp2 over 64": ((*SPLIT, *KEPT, "--parallel.strategy", "fsdp2"), True, 64),
}


@pytest.mark.parametrize(("rungs", "tied", "world"), TRACED.values(), ids=TRACED)
def test_a_plan_of_each_rung_is_what_a_traced_step_holds(
    rungs: tuple[str, ...], tied: bool, world: int
) -> None:
    model = replace(PRESETS["qwen2.5-0.5b"], num_layers=2, vocab_size=32768, tie_word_embeddings=tied)
    config = parse_command_line([*CARD, "--batch-size", str(2 * world), *rungs]).config
    said, found = memory_of(model, config, world), trace(model, config, world_size=world)
    strategy, memory = named(config.parallel.strategy, world), config.memory
    state = State.of(
        model,
        shards(strategy, world, world),
        strategy,
        config.parallel.offload,
        config.optimizer.state_bits,
        Storage(weights=memory.weights, gradients=memory.gradients),
    )
    there = state.host_parts
    assert state.weights == pytest.approx(found.weights, rel=0.01)
    assert state.low + there.get("low bits", 0) == pytest.approx(found.low, rel=0.01)
    assert state.gradients + there.get("gradients", 0) == pytest.approx(found.gradients, rel=0.01)
    assert state.optimizer + there.get("moments", 0) == pytest.approx(found.optimizer, rel=0.01)
    assert said.total == pytest.approx(found.peak, rel=0.05)
    assert said.host == pytest.approx(found.host_peak, rel=0.05)


def memory_of(model: Any, config: Any, world: int = 1) -> Any:
    """The plan of one process of this architecture, which need not be a preset."""
    return next(iter(plan._memory(model, config, world).values()))


def test_8b_trains_exactly_on_a_card_of_24_gb_with_64_gb_of_host_memory() -> None:
    config = parse_command_line(
        [*CARD, "--batch-size", "16", "--model", "qwen3-8b", *RUNGS["offloaded"]]
    ).config
    memory = memory_of(PRESETS["qwen3-8b"], config)
    assert memory.total <= 20 * GIB
    assert memory.host <= 64 * GIB


@pytest.mark.parametrize(
    ("model", "host", "weights"),
    [("qwen2.5-1.5b", None, "split"), ("qwen2.5-3b", "64GiB", "split"), ("qwen3-8b", "64GiB", "split")],
)
def test_what_fits_is_found_and_written_as_a_configuration_that_a_plan_confirms(
    model: str, host: str | None, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "fits.yaml"
    flags = ["plan", "--model", model, "--mode", "from-scratch", *CARD, "--batch-size", "16"]
    flags += ["--run-dir", str(tmp_path / "run")]
    given = ["--fit", "22GiB", *(("--host", host) if host else ()), "--write", str(path)]
    assert main([*flags, *given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["keys"]["memory.weights"] == weights
    assert found["memory"]["total"] <= 22 * GIB
    assert found["more_s"] >= 0
    config = load_config(path)
    assert config.model == model
    assert memory_of(PRESETS[model], config).total == found["memory"]["total"]


def test_what_does_not_fit_is_refused_with_the_least_that_would(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["plan", "--model", "qwen2.5-7b", "--mode", "from-scratch", *CARD, "--fit", "8GiB"]
    assert main(flags) == ExitCode.USAGE
    said = capsys.readouterr().err
    assert "no rung of the memory ladder fits in 8 GiB" in said
    assert "give more host memory with --host" in said
    with pytest.raises(SystemExit, match="2"):
        main([*flags[:-1], "many"])
    assert main([*flags, "--processes", "2"]) == ExitCode.USAGE


def test_host_memory_that_is_not_there_is_refused_before_loading_with_what_would_fit(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(tmp_path / "run")]
    flags += ["--parallel.precision", "bf16", *OFFLOAD]
    config = parse_command_line(flags).config.resolved()
    model = make_plan(config, world_size=1, rate=Rate()).model
    needed = host_bytes(model, config, world_size=1)
    assert needed == pytest.approx(12 * model.parameter_count(), rel=1e-6)
    free = type(psutil.virtual_memory())
    monkeypatch.setattr(
        psutil,
        "virtual_memory",
        lambda: free(*[needed - 1] * len(free._fields)),  # type: ignore[attr-defined]
    )
    assert run_here(*flags) == ExitCode.USAGE
    refused = capsys.readouterr().err
    assert "of host memory" in refused
    assert "use --optimizer.state-bits 8" in refused
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"--optimizer\.state-bits 8 --memory\.gradients bf16"):
        check_host_memory(model, config, world_size=1, processes=1, available=int(0.6 * needed))
    with pytest.raises(UsageError, match="no rung makes it fit"):
        check_host_memory(model, config, world_size=1, processes=1, available=1000)
    check_host_memory(model, config, world_size=1, processes=1, available=needed)
