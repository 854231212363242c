"""What the simulation of many GPUs says: checked against real runs where there are some."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders.runs import TINY, verdict
from builders.several import HAS_COMPILER, STEPS, STRATEGIES

from apr_dist.choices import Precision, Strategy
from apr_dist.cli.plan import plan as plan_verb
from apr_dist.config.reading import validate
from apr_dist.errors import UsageError
from apr_dist.model.config import TransformerConfig, preset
from apr_dist.model.families import Family
from apr_dist.planning.activations import Load
from apr_dist.planning.memory import estimate
from apr_dist.planning.simulation import WORLDS, sent_bytes, simulate


def tiny() -> TransformerConfig:
    return TransformerConfig.from_metadata(
        TINY, family=Family.QWEN2, where="the suite's model", tie_word_embeddings=True
    )


@pytest.mark.parametrize(
    ("world", "name"), [(world, name) for world in (2, 4) for name in STRATEGIES[world] if "-" not in name]
)
def test_shares_of_weights_and_moments_are_those_real_ranks_hold(
    strategies: Path, world: int, name: str
) -> None:
    if name.startswith("zero") and not HAS_COMPILER:
        pytest.skip("DeepSpeed builds its CPU modules with a C++ compiler, and there is none")
    run = strategies / str(world) / name
    facts = verdict(run)["facts"]
    load = Load(micro_batch=1, seq_length=32, accumulates=True, precision=Precision.F32, cuda=False)
    size = 2 if name == "hsdp" else world
    said = estimate(tiny(), load, strategy=Strategy(name), world_size=world, shard_size=size)
    assert said.weights >= 4 * facts["shard_elements"][0]
    if name in {"ddp", "zero1", "zero2"}:  # nothing is gathered beside
        assert said.weights == 4 * facts["shard_elements"][0]
    if name not in {"ddp", "hsdp"}:  # their ranks hold more than they write
        (part,) = (run / "steps" / f"{STEPS:06d}").glob(f"optimizer-00000-of-{world:05d}.safetensors")
        assert said.optimizer == pytest.approx(part.stat().st_size, abs=20_000)


def test_volumes_are_those_of_ring_collectives() -> None:
    def sent(strategy: Strategy, *, micro_batches: int = 1, precision: Precision = Precision.BF16) -> int:
        return sent_bytes(
            1000, strategy, gpus=16, shard_size=8, micro_batches=micro_batches, precision=precision
        )

    assert sent(Strategy.DDP) == sent(Strategy.DDP, micro_batches=4) == 2 * 4000 * 15 // 16
    assert sent(Strategy.ZERO1, micro_batches=4) == sent(Strategy.DDP)
    assert sent(Strategy.ZERO2, micro_batches=4) == 5 * (4000 * 15 // 16)
    assert sent(Strategy.ZERO3, micro_batches=2) == 6 * (4000 * 15 // 16)
    assert sent(Strategy.FSDP2) == 2 * (2000 * 15 // 16) + 4000 * 15 // 16
    assert sent(Strategy.FSDP2, precision=Precision.F32) == sent(Strategy.ZERO3)
    assert sent(Strategy.SHARD_GRAD_OP) == 2000 * 15 // 16 + 4000 * 15 // 16
    assert sent(Strategy.HSDP) == 2 * (2000 * 7 // 8) + 4000 * 7 // 8 + 2 * (500 // 2)


def test_more_gpus_hold_larger_models_only_where_the_state_is_cut() -> None:
    config = validate(
        {"seq_length": 2048, "batch_size": 8, "micro_batch_size": 1, "parallel": {"precision": "bf16"}},
        where="test",
    )
    points = simulate(preset("llama-370m"), config, gpu_bytes=80 << 30)
    by = {(point.strategy, point.gpus): point for point in points}
    assert {gpus for _, gpus in by} == set(WORLDS)
    ddp = [by[Strategy.DDP, gpus].largest_parameters for gpus in WORLDS]
    fsdp2 = [by[Strategy.FSDP2, gpus].largest_parameters for gpus in WORLDS]
    assert len(set(ddp)) == 1
    assert fsdp2 == sorted(fsdp2)
    assert fsdp2[-1] > fsdp2[0] > 2 * ddp[0]  # what is left are activations, which nobody cuts
    hsdp = [by[Strategy.HSDP, gpus].largest_parameters for gpus in WORLDS]
    assert set(hsdp) == {fsdp2[0]}  # its shards lie over one machine of eight


def test_the_verb_prints_every_strategy_and_names_what_does_not_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--synthetic", "--mode", "from-scratch", "--model", "llama-370m", "--micro-batch-size", "1"]
    assert plan_verb([*flags, "--simulate", "6", "--json"]) == 0
    points = json.loads(capsys.readouterr().out)
    assert len(points) == len(WORLDS) * 7
    fits = {(point["strategy"], point["gpus"]): point["fits"] for point in points}
    assert not fits["ddp", 4096]
    assert fits["fsdp2", 64]
    assert plan_verb([*flags, "--simulate", "6"]) == 0
    table = capsys.readouterr().out
    assert all(len(line) <= 80 for line in table.splitlines())
    assert "4,096" in table
    assert "NO" in table
    for strategy in {name for name, _ in fits}:
        enough = [gpus for gpus in WORLDS if fits[strategy, gpus]]
        ends = f"fits on {min(enough):,} GPUs of 6 GiB or more" if enough else "does not fit on GPUs of 6 GiB"
        assert f"\n{strategy}: {ends}" in table
    with pytest.raises(UsageError, match="simulate is 0"):
        plan_verb([*flags, "--simulate", "0"])
