"""The same numbers everywhere: the same twenty global batches under every strategy and world size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from builders.runs import metrics, verdict
from builders.several import BF16, HALF, HAS_COMPILER, MIXTURE, MOVED, STEPS, STRATEGIES, Z_LOSS

from apr_dist.apr.reader import AprReader

if TYPE_CHECKING:
    from builders.runs import Inputs

ELEMENTS = 107_072
"""Parameters of the tiny pretrained model, the tied embedding counted once."""

CASES = [
    pytest.param(
        world,
        name,
        id=f"{world}-{name}",
        marks=pytest.mark.skipif(
            name.startswith("zero") and not HAS_COMPILER,
            reason="DeepSpeed builds its CPU modules with a C++ compiler, and there is none",
        ),
    )
    for world, named in STRATEGIES.items()
    for name in named
]

RESUMED = [case for case in CASES if case.values[0] == 2 or case.values[1] == "hsdp"]


def steps_of(run: Path) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in metrics(run)}


def steps_after_half(run: Path) -> dict[int, dict[str, Any]]:
    """The step lines that a resumed run wrote itself; those before came along from the run it continues."""
    found = steps_of(run)
    assert sorted(found) == list(range(1, STEPS + 1))
    return {step: line for step, line in found.items() if step > HALF}


def state_of(run: Path) -> dict[str, bytes]:
    """Every byte of the last step folder that says what was trained: weights, moments, random states."""
    folder = run / "steps" / f"{STEPS:06d}"
    with AprReader(folder / "checkpoint.apr") as reader:
        found = {name: bytes(reader.raw(name)) for name in reader.tensors}
    return found | {path.name: path.read_bytes() for path in folder.glob("optimizer*")}


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-002")
@pytest.mark.parametrize(("world", "name"), CASES)
def test_losses_and_norms_are_those_of_one_process(strategies: Path, world: int, name: str) -> None:
    alone, run = steps_of(strategies / "1" / "single"), strategies / str(world) / name
    found = steps_of(run)
    assert sorted(found) == sorted(alone) == list(range(1, STEPS + 1))
    for step, line in alone.items():
        assert found[step]["train_loss"] == pytest.approx(line["train_loss"], rel=1e-6), step
        assert found[step]["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-6), step
    ends = [metrics(one, "evaluation")[-1]["val_loss"] for one in (strategies / "1" / "single", run)]
    assert ends[1] == pytest.approx(ends[0], rel=1e-6)


@pytest.mark.parametrize("name", Z_LOSS[2])
def test_z_loss_and_ignored_targets_are_those_of_one_process(strategies: Path, name: str) -> None:
    if name.startswith("zero") and not HAS_COMPILER:
        pytest.skip("DeepSpeed builds its CPU modules with a C++ compiler, and there is none")
    alone, found = steps_of(strategies / "1" / "single-z"), steps_of(strategies / "2" / f"{name}-z")
    without = steps_of(strategies / "1" / "single")
    assert sorted(found) == sorted(alone) == list(range(1, STEPS + 1))
    for step, line in alone.items():
        assert found[step]["train_loss"] == pytest.approx(line["train_loss"], rel=1e-6), step
        assert found[step]["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-6), step
        assert abs(line["grad_norm"] / without[step]["grad_norm"] - 1) > 1e-4, "or it added nothing"


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-052")
@pytest.mark.parametrize("name", MIXTURE[2])
def test_a_mixture_s_numbers_are_those_of_one_process(strategies: Path, name: str) -> None:
    """Losses, norms, the router's figures, an exact resume, and the strategy that was active."""
    if name.startswith("zero") and not HAS_COMPILER:
        pytest.skip("DeepSpeed builds its CPU modules with a C++ compiler, and there is none")
    alone, run = strategies / "1" / "single-mixture", strategies / "2" / f"{name}-mixture"
    expected, found = steps_of(alone), steps_of(run)
    assert sorted(found) == sorted(expected) == list(range(1, STEPS + 1))
    for step, line in expected.items():
        for key in ("train_loss", "grad_norm"):
            assert found[step][key] == pytest.approx(line[key], rel=1e-6), (step, key)
        for key in ("balance_loss", "z_loss", "entropy", "load_min", "load_max"):
            assert found[step]["router"][key] == pytest.approx(line["router"][key], rel=1e-5), (step, key)
        assert found[step]["router"]["dropped"] == 0.0
    facts, whole = verdict(run)["facts"], verdict(alone)["facts"]["parameter_elements"]
    assert (facts["strategy"], facts["world_size"], facts["parameter_elements"]) == (name, 2, whole)
    shares = facts["shard_elements"]
    assert shares == [whole, whole] if name == "ddp" else max(shares) < 0.6 * whole
    resumed = run.with_name(f"{run.name}-resumed")
    for step, line in steps_after_half(resumed).items():
        assert [line[key] for key in ("train_loss", "grad_norm", "router")] == [
            found[step][key] for key in ("train_loss", "grad_norm", "router")
        ]
    assert state_of(resumed) == state_of(run)


@pytest.mark.parametrize(("world", "name"), CASES)
def test_the_strategy_that_ran_is_the_one_that_was_asked_for(strategies: Path, world: int, name: str) -> None:
    asked = STRATEGIES[world][name]
    facts = verdict(strategies / str(world) / name)["facts"]
    size = 2 if name == "hsdp" else world if asked[0] in {"fsdp2", "shard-grad-op", "zero3"} else 1
    assert (facts["strategy"], facts["world_size"]) == (asked[0], world)
    assert facts["parameter_elements"] == ELEMENTS
    assert facts["shard_elements"] == [ELEMENTS // size] * world
    if asked[0].startswith("zero"):
        assert facts["zero_stage"] == int(asked[0][-1])
        assert sum(facts["optimizer_elements"]) == ELEMENTS
        assert max(facts["optimizer_elements"]) < 1.1 * ELEMENTS / world
        offloaded = "--parallel.offload" in asked
        assert facts["optimizer"] == ("DeepSpeedCPUAdam" if offloaded else "AdamW")


@pytest.mark.parametrize(("world", "name"), CASES)
def test_forward_backward_and_update_are_told_apart(strategies: Path, world: int, name: str) -> None:
    for line in steps_of(strategies / str(world) / name).values():
        parts = [line[key] for key in ("forward_ms", "backward_ms", "update_ms")]
        assert min(parts) > 0
        assert sum(parts) <= line["wall_ms"]


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-001")
@pytest.mark.parametrize(("world", "name"), CASES)
def test_the_weights_of_every_rank_were_proven_to_be_the_file_s(
    strategies: Path, world: int, name: str
) -> None:
    gates = verdict(strategies / str(world) / name)["gates"]
    (arrived,) = [gate for gate in gates if gate["gate"] == "weights arrived in the network"]
    assert arrived["passed"]
    assert f"digests equal on {world} rank(s)" in arrived["measured"]


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-008")
@pytest.mark.parametrize(("world", "name"), RESUMED)
def test_a_resumed_run_is_the_straight_one_bit_for_bit_under_every_strategy(
    strategies: Path, world: int, name: str
) -> None:
    run = strategies / str(world) / name
    resumed = run.with_name(f"{name}-resumed")
    straight, after = steps_of(run), steps_after_half(resumed)
    for step, line in after.items():
        for key in ("train_loss", "grad_norm", "lr", "tokens_seen"):
            assert line[key] == straight[step][key], (step, key)
    assert state_of(resumed) == state_of(run)


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-008")
@pytest.mark.parametrize(("world", "name"), [(world, name) for world in MOVED for name in MOVED[world]])
def test_a_run_goes_on_under_another_world_size_and_strategy(strategies: Path, world: int, name: str) -> None:
    moved = strategies / str(world) / f"{name}-moved"
    if not moved.exists() and not HAS_COMPILER:
        pytest.skip("DeepSpeed builds its CPU modules with a C++ compiler, and there is none")
    alone, after = steps_of(strategies / "1" / "single"), steps_after_half(moved)
    for step, line in after.items():
        assert line["tokens_seen"] == alone[step]["tokens_seen"]
        assert line["train_loss"] == pytest.approx(alone[step]["train_loss"], rel=1e-5), step


@pytest.mark.parametrize("name", BF16)
def test_bf16_computes_near_f32_over_f32_master_weights(strategies: Path, name: str) -> None:
    if name.startswith("zero") and not HAS_COMPILER:
        pytest.skip("DeepSpeed builds its CPU modules with a C++ compiler, and there is none")
    exact, run = steps_of(strategies / "2" / name), strategies / "2" / f"{name}-bf16"
    rounded = steps_of(run)
    differences = [abs(rounded[step]["train_loss"] / exact[step]["train_loss"] - 1) for step in exact]
    assert 0 < max(differences) < 2e-3
    with AprReader(run / "steps" / f"{STEPS:06d}" / "checkpoint.apr") as reader:
        # A bf16 master would have nothing in the lower half of its bits.
        low = [bytes(reader.raw(tensor))[0::4] + bytes(reader.raw(tensor))[1::4] for tensor in reader.tensors]
    assert all(any(part) for part in low)


def test_the_training_state_is_cut_over_the_ranks(strategies: Path) -> None:
    for world, name in ((2, "ddp"), (2, "fsdp2"), (4, "hsdp")):
        folder = strategies / str(world) / name / "steps" / f"{STEPS:06d}"
        parts = sorted(folder.glob("optimizer-*.safetensors"))
        assert [part.name for part in parts] == [
            f"optimizer-{rank:05d}-of-{world:05d}.safetensors" for rank in range(world)
        ]
        moments = 2 * 4 * ELEMENTS
        assert all(part.stat().st_size < moments / world * 1.1 + 20_000 for part in parts)
        index = json.loads((folder / "optimizer.json").read_text())
        assert (index["updates"], sorted(index["files"])) == (STEPS, [part.name for part in parts])


def test_tied_embeddings_stay_one_tensor_of_every_checkpoint(strategies: Path, inputs: Inputs) -> None:
    with AprReader(inputs.pretrained) as reader:
        wanted = set(reader.tensors)
    assert "lm_head.weight" not in wanted
    for path in strategies.glob(f"[124]/*/steps/{STEPS:06d}/checkpoint.apr"):
        if "mixture" in path.parts[-4]:  # of another model, whose head is its own
            continue
        with AprReader(path) as reader:
            assert set(reader.tensors) == wanted, path
