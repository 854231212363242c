"""What a plan says a rank holds, offloaded or not, is what real ranks hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders.runs import REPOSITORY
from builders.several import HAS_COMPILER
from builders.state_ranks import ADAPTED, ADAPTER, CASES, EIGHT_BIT, SHAPE

from apr_dist.choices import Offload, Precision, Strategy
from apr_dist.cli.plan import plan as plan_verb
from apr_dist.config.sections import AdapterSection
from apr_dist.gates.adapters import adapter_of
from apr_dist.parallel.stored_bytes import F32
from apr_dist.planning.activations import Load
from apr_dist.planning.memory import estimate
from apr_dist.planning.state import State, most_possible, shards

WORLD = 2
LOAD = Load(micro_batch=1, seq_length=32, accumulates=False, precision=Precision.F32, cuda=True)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, int]]:
    """Bytes that both ranks held between steps, all in one launch."""
    folder = tmp_path_factory.mktemp("state")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["TORCH_EXTENSIONS_DIR"] = str(REPOSITORY / ".build" / "torch_extensions")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(WORLD)]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command += [str(Path(__file__).parent / "builders" / "state_ranks.py"), str(folder)]
    command += [] if HAS_COMPILER else ["--no-deepspeed"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"state-{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize(("strategy", "offload"), CASES)
def test_the_state_of_a_plan_is_the_state_of_a_real_rank(
    strategy: Strategy, offload: Offload, held: list[dict[str, int]]
) -> None:
    if strategy.zero_stage and not HAS_COMPILER:
        pytest.skip("DeepSpeed builds its CPU modules with a C++ compiler, and there is none")
    said = State.of(SHAPE, shards(strategy, WORLD, WORLD), strategy, offload)
    wanted = said.weights + said.optimizer + said.masters + said.host
    if strategy is Strategy.ZERO3 and offload is Offload.NONE:
        wanted += said.gradients  # their buffer stays; the others let go of gradients after a step
    if strategy.is_fsdp and offload is not Offload.NONE:
        wanted -= F32 * SHAPE.parameter_count() // WORLD
    if strategy is Strategy.DDP or (strategy.zero_stage and offload is not Offload.NONE):
        wanted += said.buckets  # under DDP gradients were views of them, so that they are seen
    for rank in held:
        assert rank[f"{strategy} {offload}"] == pytest.approx(wanted, rel=0.005)


@pytest.mark.parametrize("strategy", EIGHT_BIT)
def test_a_plan_knows_how_small_8_bit_state_is(strategy: Strategy, held: list[dict[str, int]]) -> None:
    cut = shards(strategy, WORLD, WORLD)
    eight, whole = (State.of(SHAPE, cut, strategy, Offload.NONE, bits) for bits in (8, 32))
    assert eight.optimizer < 0.4 * whole.optimizer
    wanted = eight.weights + eight.optimizer + eight.buckets
    for rank in held:
        assert rank[f"{strategy} 8 bits"] == pytest.approx(wanted, rel=0.005)


@pytest.mark.parametrize("strategy", ADAPTED)
def test_a_plan_knows_what_an_adapter_and_its_frozen_base_hold(
    strategy: Strategy, held: list[dict[str, int]]
) -> None:
    if strategy.zero_stage and not HAS_COMPILER:
        pytest.skip("DeepSpeed builds its CPU modules with a C++ compiler, and there is none")
    adapter = adapter_of(AdapterSection(**ADAPTER), SHAPE)
    cut = shards(strategy, WORLD, WORLD)
    said = State.of(SHAPE, cut, strategy, Offload.NONE, adapter=adapter)
    whole = State.of(SHAPE, cut, strategy, Offload.NONE)
    assert said.weights < 0.8 * whole.weights
    assert said.optimizer < 0.5 * whole.optimizer
    wanted = said.weights + said.optimizer + said.masters + said.buckets
    for rank in held:
        assert rank[f"{strategy} adapter"] == pytest.approx(wanted, rel=0.005)


def test_a_plan_counts_8_bits_only_where_the_strategy_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--synthetic", "--mode", "from-scratch", "--model", "llama-370m", "--micro-batch-size", "1"]
    flags += ["--device", "cuda", "--processes", "8", "--json"]
    found = []
    for bits in ("32", "8"):
        plan_verb([*flags, "--optimizer.state-bits", bits])
        found.append(json.loads(capsys.readouterr().out)["memory_bytes"])
    for name in ("ddp", "fsdp2", "hsdp"):
        assert found[1][name]["optimizer"] < 0.4 * found[0][name]["optimizer"]
    assert found[1]["zero1"] == found[0]["zero1"]


@pytest.mark.parametrize(("strategy", "offload"), CASES)
def test_what_is_offloaded_leaves_the_gpu_and_is_in_host_memory(strategy: Strategy, offload: Offload) -> None:
    without, said = (
        estimate(SHAPE, LOAD, strategy=strategy, world_size=8, shard_size=8, offload=one)
        for one in (Offload.NONE, offload)
    )
    assert said.offload is offload
    if offload is Offload.NONE:
        assert said.host == said.offloaded == 0
        return
    assert said.optimizer == said.masters == 0
    # A streamed update has buffers of one size, which a small model is smaller than: the state is compared.
    kept = [one.weights + one.low + one.gradients + one.optimizer + one.masters for one in (without, said)]
    assert kept[0] > kept[1]
    assert said.host >= without.optimizer + without.masters


def test_a_strategy_offloads_as_much_of_what_is_asked_as_it_can() -> None:
    both = Offload.OPTIMIZER_AND_PARAMETERS
    assert most_possible(Strategy.DDP, both) is Offload.OPTIMIZER
    assert most_possible(Strategy.ZERO2, both) is Offload.OPTIMIZER
    assert most_possible(Strategy.FSDP2, Offload.OPTIMIZER) is Offload.NONE
    assert most_possible(Strategy.ZERO3, both) is both


def test_a_plan_and_a_simulation_say_what_host_memory_takes(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--synthetic", "--mode", "from-scratch", "--model", "llama-370m", "--micro-batch-size", "1"]
    flags += ["--parallel.strategy", "zero3", "--device", "cuda", "--no-checkpoint.background"]
    offloaded = [*flags, "--parallel.offload", "optimizer+parameters"]
    plan_verb([*offloaded, "--processes", "8", "--json"])
    found = json.loads(capsys.readouterr().out)
    parameters, zero3 = found["parameters"], found["memory_bytes"]["zero3"]
    assert zero3["host"] == pytest.approx(6 * 4 * parameters / 8, rel=1e-6)
    plan_verb([*offloaded, "--processes", "8"])
    assert "in host memory, optimizer+parameters offloaded" in capsys.readouterr().out
    hosts, totals = [], []
    for given in (flags, offloaded):
        assert plan_verb([*given, "--simulate", "6", "--json"]) == 0
        points = {(one["strategy"], one["gpus"]): one for one in json.loads(capsys.readouterr().out)}
        hosts.append(points["zero3", 8]["memory"]["host"])
        totals.append(points["zero3", 8]["total"])
    assert hosts[0] == 0
    assert hosts[1] == zero3["host"]
    assert totals[1] < totals[0]
