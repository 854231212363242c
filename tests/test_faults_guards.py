"""Steps that are refused, skipped and looked at again, with numbers that really overflow."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders.broken import token_of_one_sequence, write_model_that_breaks_at
from builders.runs import metrics, run_here, verdict

from apr_dist.cli import main
from apr_dist.config.sections import GuardsSection
from apr_dist.errors import ExitCode, NumericalInstability
from apr_dist.parallel.runtime import reset_state
from apr_dist.runs.progress import GuardState
from apr_dist.training.step_guard import SkipStep, StepGuard

if TYPE_CHECKING:
    from builders.runs import Inputs


def flags(inputs: Inputs, run_dir: Path, *more: str) -> list[str]:
    given = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(run_dir)]
    given += ["--num-steps", "6", "--eval-every", "2", "--warmup-steps", "1", "--target-val-loss", "0.1"]
    return [*given, *more]


EVALUATED = 4
"""Held-out sequences that are looked at, where a token must not be in one."""

EXPLODING = ("--lr", "1e30")
"""The first update throws the weights out of what f32 can compute with."""


def replayed(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    capfd.readouterr()
    reset_state()
    assert main(["replay", *arguments, "--json"]) == 0
    reset_state()
    found: dict[str, object] = json.loads(capfd.readouterr().out)
    return found


@pytest.mark.falsifies("INV-TRAIN-007")
def test_a_loss_that_is_no_number_stops_the_run_and_logs_its_batch(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    long = ("--num-steps", "6", "--eval-every", "6")
    assert run_here(*flags(inputs, run_dir, *EXPLODING, *long)) == ExitCode.NUMERICAL_INSTABILITY
    assert "step 2, global batch 1, sequences 4 to 7: " in capfd.readouterr().err
    (refused,) = metrics(run_dir, "refused")
    assert (refused["batch"], refused["sequences"]) == (1, [4, 7])
    code, facts = verdict(run_dir)["exit_code"], verdict(run_dir)["facts"]
    assert (code, facts["batch"], facts["failed_phase"]) == (8, 1, "training")
    found = replayed(capfd, str(run_dir))
    assert (found["step"], found["redone"]) == (2, 1)
    assert found["recorded"]["kind"] == "refused"  # type: ignore[index]
    assert "nan" in {found["loss"], found["grad_norm"]}


def test_steps_that_are_no_number_are_skipped_up_to_the_limit_where_that_is_configured(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    skipping = ("--guards.on-nonfinite", "skip", "--guards.max-skipped", "2", "--eval-every", "6")
    code = run_here(*flags(inputs, run_dir, *EXPLODING, *skipping))
    assert code == ExitCode.NUMERICAL_INSTABILITY
    assert "2 steps were skipped and this one would be the next" in capfd.readouterr().err
    assert [line["step"] for line in metrics(run_dir, "skipped")] == [2, 3]
    assert [line["step"] for line in metrics(run_dir, "refused")] == [4]


def test_spikes_are_skipped_counted_and_remembered_over_a_resume(inputs: Inputs, tmp_path: Path) -> None:
    """A factor close to one makes spikes of ordinary steps; a stop in between changes none of them."""
    small = ("--guards.spike-factor", "1.02", "--guards.spike-window", "2", "--guards.max-skipped", "9")
    guarded = ("--guards.on-spike", "skip", *small, "--checkpoint.keep-last", "9", "--lr", "1e-4")
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert run_here(*flags(inputs, straight, *guarded)) == 0
    skipped = [line["step"] for line in metrics(straight, "skipped")]
    assert skipped
    assert sorted(skipped + [line["step"] for line in metrics(straight)]) == [1, 2, 3, 4, 5, 6]
    assert verdict(straight)["facts"]["skipped_steps"] == len(skipped)
    first = ("--resume", str(straight / "steps" / "000002"))
    assert run_here(*flags(inputs, resumed, *guarded, *first)) == 0
    assert [line["step"] for line in metrics(resumed, "skipped")] == [step for step in skipped if step > 2]
    digests = [verdict(run)["facts"]["weights_digest"] for run in (straight, resumed)]
    assert digests[0] == digests[1]


def test_a_spike_is_judged_against_the_median_of_updates_and_never_before_the_window_is_full() -> None:
    options = GuardsSection.model_validate({"on_spike": "skip", "spike_factor": 2, "spike_window": 3})
    guard = StepGuard(options, batch_size=4, state=GuardState())
    for batch, norm in enumerate([1.0, 50.0, 1.0]):
        guard.check(batch=batch, train_loss=1.0, grad_norm=norm)
    guard.check(batch=3, train_loss=1.0, grad_norm=2.0)
    with pytest.raises(SkipStep, match=r"grad_norm 4\.1 is above 4, 2 times the median"):
        guard.check(batch=4, train_loss=1.0, grad_norm=4.1)
    assert guard.state == GuardState(skipped=1, recent=[50.0, 1.0, 2.0])
    stopping = {**options.model_dump(), "on_spike": "stop", "spike_of": "loss"}
    guard = StepGuard(GuardsSection.model_validate(stopping), batch_size=4, state=GuardState())
    for batch in range(3):
        guard.check(batch=batch, train_loss=1.0, grad_norm=9.0)
    with pytest.raises(NumericalInstability, match="train_loss 3 is above 2"):
        guard.check(batch=3, train_loss=3.0, grad_norm=9.0)


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-021")
def test_replay_names_the_one_sequence_that_holds_the_token_a_model_breaks_at(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One channel is zero but for one token, and so amplified that this token's attention overflows."""
    token, row = token_of_one_sequence(inputs, batch=0, evaluated=EVALUATED)
    broken = write_model_that_breaks_at(token, inputs, tmp_path / "broken.apr")
    run_dir = tmp_path / "run"
    few = ("--evaluation.max-sequences", str(EVALUATED), "--evaluation.random-sequences", "0")
    code = run_here(*flags(inputs, run_dir, "--init", str(broken), "--lr", "1e-4", *few))
    assert code == ExitCode.NUMERICAL_INSTABILITY
    assert metrics(run_dir, "refused")[0]["step"] == 1
    found = replayed(capfd, str(run_dir))
    assert found["culprits"] == [row]
    (culprit,) = [one for one in found["sequences"] if one["number"] == row]  # type: ignore[attr-defined]
    assert culprit["text"]
    reset_state()
    assert main(["replay", str(run_dir), "--step", "1"]) == 0
    assert f"* sequence {row:>8}" in capfd.readouterr().out
    assert main(["replay", str(run_dir), "--step", "99"]) == ExitCode.USAGE


def test_replay_of_a_sound_step_gives_the_figures_the_run_recorded(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert run_here(*flags(inputs, run_dir, "--lr", "1e-3", "--checkpoint.keep-last", "9")) == 0
    found = replayed(capfd, str(run_dir), "--step", "4")
    recorded = metrics(run_dir)[3]
    assert str(found["begun_from"]).endswith("000002/checkpoint.apr")
    assert found["redone"] == 1
    assert found["loss"] == pytest.approx(recorded["train_loss"], rel=1e-6)
    assert found["grad_norm"] == pytest.approx(recorded["grad_norm"], rel=1e-5)
    losses = [one["loss"] for one in found["sequences"]]  # type: ignore[attr-defined]
    assert math.fsum(losses) / len(losses) == pytest.approx(recorded["train_loss"], rel=1e-5)
