"""The share of updates that rounding swallows: measured, refused where it is large, in the verdict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from builders.models import tiny_config
from builders.runs import metrics, run_here, verdict
from builders.sessions import open_alone

from apr_dist.choices import Strategy, WeightStorage
from apr_dist.errors import ExitCode, WeightsRefused
from apr_dist.gates.updates import MOST_LOST, refuse_lost_updates, updates_gate
from apr_dist.parallel.lost_updates import LostUpdates

if TYPE_CHECKING:
    from builders.runs import Inputs

UPDATES = "FALSIFY-APR-DIST-TRAINER-041"


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-041")
@pytest.mark.parametrize("weights", ["f32", "split", "bf16-nearest"])
def test_the_shares_are_those_of_a_count_by_hand(weights: str) -> None:
    model = tiny_config(vocab_size=128, hidden_size=32, tie_word_embeddings=False)
    batches = [torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(3))] * 2
    settings = {
        "batch_size": 4,
        "seq_length": 16,
        "num_steps": 2,
        "lr": 1e-5,
        "optimizer": {"weight_decay": 0},
    }
    with open_alone(
        model,
        Strategy.SINGLE,
        parallel={"precision": "bf16"},
        memory={"weights": weights},
        batches=batches,
        **settings,
    ) as session:
        session.stepper.take(0, compare=False, more=True)
        names = [name for name, _ in session.model.named_parameters()]
        before = {name: session.weight(name).double() for name in names}
        session.sample.look()
        session.stepper.take(1, compare=False, more=False)
        lost = session.sample.compare()
        rate = session.engine.optimizer.param_groups[0]["lr"]
        counts = torch.zeros(3, dtype=torch.float64)
        for name, parameter in session.model.named_parameters():
            state = session.engine.optimizer.state[parameter]
            first, second = (state[key].double().view(-1) for key in ("exp_avg", "exp_avg_sq"))
            update = rate / (1 - 0.9**2) * first / ((second / (1 - 0.999**2)).sqrt() + 1e-8)
            old, new = before[name].view(-1), session.weight(name).double().view(-1)
            rounded = weights == "bf16-nearest" and parameter.dtype is torch.bfloat16
            bits = 7 if rounded else 23
            unit = torch.exp2(torch.floor(torch.log2(old.abs())) - bits)
            meant = update != 0
            counts += torch.stack(
                [meant.sum(), (meant & (update.abs() < unit / 2)).sum(), (meant & (old == new)).sum()]
            )
    assert lost is not None
    assert lost.below_half_ulp == pytest.approx(float(counts[1] / counts[0]), rel=1e-6, abs=1e-9)
    assert lost.unchanged == pytest.approx(float(counts[2] / counts[0]), rel=1e-6, abs=1e-9)
    assert counts[0] < sum(len(one.view(-1)) for one in before.values()), "rows of unseen tokens do not count"
    assert (lost.below_half_ulp > MOST_LOST) == (weights == "bf16-nearest")


def flags(inputs: Inputs, run: Path, *more: str) -> list[str]:
    given = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(run), "--lr", "1e-5"]
    given += ["--num-steps", "4", "--eval-every", "2", "--warmup-steps", "0", "--target-val-loss", "0.1"]
    return [*given, "--parallel.precision", "bf16", *more]


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-041")
def test_rounding_to_the_nearest_is_refused_where_it_swallows_the_training(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert run_here(*flags(inputs, run, "--memory.weights", "bf16-nearest")) == ExitCode.GATE
    said = capsys.readouterr().err
    assert UPDATES in said
    assert "of the updates are smaller than half a unit in the last place" in said
    assert "--memory.weights split" in said
    lost = metrics(run, "evaluation")[-1]["updates_lost"]
    assert lost["below_half_ulp"] > MOST_LOST
    assert verdict(run)["status"] == "ABORTED"


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-041")
@pytest.mark.parametrize("weights", ["f32", "split", "bf16"])
def test_what_f32_and_split_weights_lose_is_small_and_in_the_verdict(
    weights: str, inputs: Inputs, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert run_here(*flags(inputs, run, "--memory.weights", weights)) == 0
    lines = [line["updates_lost"] for line in metrics(run, "evaluation")]
    assert lines[0] is None, "before the first step"
    facts = verdict(run)["facts"]["updates_lost"]
    assert facts == lines[-1] == LostUpdates(**facts).to_json()
    (gate,) = [one for one in verdict(run)["gates"] if one["id"] == UPDATES]
    assert gate["passed"]
    if weights == "bf16":
        assert facts["below_half_ulp"] > MOST_LOST, "which rounding at random makes up for"
        assert "rounded at random" in gate["required"]
    else:
        assert facts["below_half_ulp"] < 0.01


@pytest.mark.parametrize("weights", list(WeightStorage))
def test_only_rounding_to_the_nearest_stops_a_run(weights: WeightStorage) -> None:
    refuse_lost_updates(MOST_LOST, weights, step=1)
    if weights is WeightStorage.BF16_NEAREST:
        with pytest.raises(WeightsRefused, match="at most 10%"):
            refuse_lost_updates(MOST_LOST + 1e-6, weights, step=1)
    else:
        refuse_lost_updates(1.0, weights, step=1)
    assert updates_gate(1.0, weights).passed == (weights is WeightStorage.BF16)
