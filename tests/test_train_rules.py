"""The pure rules of training: schedule, optimizer groups, guards, early stop, verdict, metrics."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from apr_dist.choices import ScheduleKind
from apr_dist.config import TrainConfig
from apr_dist.config.sections import GuardsSection
from apr_dist.errors import (
    Divergence,
    ExitCode,
    LossRefused,
    NumericalInstability,
    OutputError,
    WeightsRefused,
)
from apr_dist.gates.losses import Agreement, evaluation_gates, final_gates, refuse_failed, step_zero_gates
from apr_dist.runs.metrics import MetricsFile, StepMetrics
from apr_dist.runs.progress import GuardState
from apr_dist.runs.verdict import Status, Verdict
from apr_dist.training.guards import EarlyStop, check_validation
from apr_dist.training.optimizer import (
    apply_lr,
    assert_each_parameter_once,
    build_optimizer,
)
from apr_dist.training.schedule import Schedule, schedule_of
from apr_dist.training.step_guard import StepGuard

SCHEDULE = Schedule(peak_lr=1e-3, warmup_steps=10, total_steps=110, lr_min=1e-5)


def test_a_rate_below_the_floor_never_rises_above_its_peak() -> None:
    tiny = schedule_of(TrainConfig(lr=2e-8, num_steps=10, warmup_steps=2))
    rates = [tiny.lr_at(step) for step in range(12)]
    assert rates[:2] == [1e-8, 2e-8]
    assert max(rates) == 2e-8
    usual = schedule_of(TrainConfig(lr=1e-6, num_steps=10, warmup_steps=2))
    assert usual.lr_at(10) == 1e-7


def optimizer_for(model: nn.Module, lr: float = 1e-2) -> torch.optim.AdamW:
    return build_optimizer(model, lr=lr, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8)


@pytest.mark.parametrize("held", [False, True], ids=["updated", "held"])
def test_the_optimizer_of_a_single_process_is_pytorch_s_bit_for_bit(held: bool) -> None:
    def trained(alone: bool) -> tuple[list[torch.Tensor], dict[str, object]]:
        torch.manual_seed(0)
        model = TiedPair()
        options = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
        optimizer = build_optimizer(model, **options, alone=alone)  # type: ignore[arg-type]
        for step in range(3):
            model(torch.arange(6) % (step + 1)).square().sum().backward()
            if held:
                optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        optimizer.load_state_dict(optimizer.state_dict())
        assert type(optimizer).__name__ == "AdamW"
        return [weight.detach() for weight in model.parameters()], optimizer.state_dict()

    (found, state), (expected, known) = trained(alone=True), trained(alone=False)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert str(state) == str(known)


class TiedPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(self.embedding(ids)))
        return out


def test_the_rate_rises_linearly_to_the_peak_and_falls_on_a_cosine_to_the_floor() -> None:
    assert SCHEDULE.lr_at(0) == pytest.approx(1e-4)
    assert SCHEDULE.lr_at(9) == SCHEDULE.lr_at(10) == pytest.approx(1e-3)
    assert SCHEDULE.lr_at(60) == pytest.approx((1e-3 + 1e-5) / 2)
    assert SCHEDULE.lr_at(110) == SCHEDULE.lr_at(10_000) == 1e-5
    decay = [SCHEDULE.lr_at(step) for step in range(10, 111)]
    assert decay == sorted(decay, reverse=True)


@pytest.mark.parametrize("kind", ScheduleKind)
def test_every_schedule_is_a_function_of_the_step_alone(kind: ScheduleKind) -> None:
    schedule = Schedule(1e-3, warmup_steps=10, total_steps=110, lr_min=1e-5, kind=kind, decay_steps=None)
    rates = [schedule.lr_at(step) for step in range(111)]
    assert [schedule.lr_at(step) for step in reversed(range(111))] == rates[::-1]
    assert rates[9] == rates[schedule.decay_begins] == 1e-3
    assert sorted(rates[9:], reverse=True) == rates[9:]
    assert rates[110] == (1e-3 if kind is ScheduleKind.CONSTANT else 1e-5)


def test_a_stable_phase_lasts_until_the_decay_that_was_asked_for() -> None:
    schedule = replace(SCHEDULE, kind=ScheduleKind.WSD, decay_steps=25)
    assert {schedule.lr_at(step) for step in range(10, 86)} == {1e-3}
    assert schedule.lr_at(86) == pytest.approx(1e-5 + 0.99e-3 * (1 - math.sqrt(1 / 25)))
    assert replace(schedule, decay_steps=None).decay_begins == 110 - 22
    assert replace(schedule, decay_steps=None, total_steps=3, warmup_steps=10).lr_at(5) == pytest.approx(6e-4)


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-009")
def test_a_new_optimizer_has_no_moments_and_the_schedule_begins_at_its_first_step() -> None:
    optimizer = optimizer_for(TiedPair())
    assert not optimizer.state
    assert SCHEDULE.lr_at(0) == SCHEDULE.peak_lr / SCHEDULE.warmup_steps


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-020")
def test_the_rate_that_is_applied_is_the_one_that_moves_the_weights() -> None:
    moved = []
    for lr in (1e-2, 1e-3):
        torch.manual_seed(0)
        model = TiedPair()
        optimizer, before = optimizer_for(model), model.norm.weight.detach().clone()
        assert apply_lr(optimizer, lr) == lr
        model(torch.tensor([1, 2])).square().sum().backward()
        optimizer.step()
        moved.append(float((model.norm.weight.detach() - before).abs().max()))
    assert moved[0] == pytest.approx(1e-2, rel=1e-3)
    assert moved[1] == pytest.approx(1e-3, rel=1e-3)


def test_matrices_decay_and_vectors_do_not() -> None:
    model = TiedPair()
    optimizer = optimizer_for(model)
    decay = {id(w): group["weight_decay"] for group in optimizer.param_groups for w in group["params"]}
    assert {decay[id(w)] for w in model.parameters() if w.ndim >= 2} == {0.1}
    assert {decay[id(w)] for w in model.parameters() if w.ndim < 2} == {0.0}


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-002")
def test_a_tied_weight_is_in_exactly_one_group_and_a_doubled_or_missing_one_is_refused() -> None:
    model = TiedPair()
    optimizer = optimizer_for(model)
    held = [weight for group in optimizer.param_groups for weight in group["params"]]
    assert len(held) == len({id(weight) for weight in held}) == 3
    optimizer.param_groups[1]["params"].append(model.embedding.weight)
    with pytest.raises(WeightsRefused, match="3 distinct"):
        assert_each_parameter_once(model, optimizer)
    optimizer.param_groups[1]["params"] = []
    with pytest.raises(WeightsRefused):
        assert_each_parameter_once(model, optimizer)


@pytest.mark.falsifies("INV-TRAIN-007")
@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)]
)
def test_a_loss_or_gradient_norm_that_is_no_number_stops_the_run(loss: float, norm: float) -> None:
    guard = StepGuard(GuardsSection(), batch_size=4, state=GuardState())
    guard.check(batch=0, train_loss=1.0, grad_norm=1.0)
    with pytest.raises(NumericalInstability, match="step 3, global batch 2, sequences 8 to 11") as stopped:
        guard.check(batch=2, train_loss=loss, grad_norm=norm)
    assert stopped.value.exit_code is ExitCode.NUMERICAL_INSTABILITY


@pytest.mark.falsifies("INV-TRAIN-005")
@pytest.mark.parametrize(
    ("val_loss", "previous", "from_scratch", "good"),
    [
        (10.0, None, False, True),
        (10.1, None, False, False),
        (2 * math.log(512) - 0.01, None, True, True),
        (2 * math.log(512) + 0.01, None, True, False),
        (6.0, 3.0, False, True),
        (6.01, 3.0, False, False),
        (math.nan, 3.0, False, False),
        (math.nan, None, True, False),
    ],
)
def test_a_validation_loss_outside_its_band_stops_the_run(
    val_loss: float, previous: float | None, from_scratch: bool, good: bool
) -> None:
    def check() -> None:
        check_validation(
            val_loss=val_loss, previous=previous, vocab_size=512, from_scratch=from_scratch, evaluation=1
        )

    if good:
        check()
        return
    with pytest.raises(Divergence) as stopped:
        check()
    assert stopped.value.exit_code is ExitCode.DIVERGENCE


@pytest.mark.falsifies("INV-TRAIN-004")
def test_patience_stops_after_more_than_that_many_bad_evaluations_and_never_before_the_third() -> None:
    stop = EarlyStop(patience=2, min_evaluations=3).after(3.0).after(3.1).after(3.0)
    assert stop.without_improvement == 2
    assert not stop.stops(5)
    assert stop.after(3.2).stops(3)
    assert not stop.after(3.2).stops(2)
    assert stop.after(2.9).without_improvement == 0
    assert stop.after(2.9).best == 2.9


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-006")
def test_step_zero_must_look_pretrained_with_an_init_and_random_without() -> None:
    vocabulary = 49_152
    good = step_zero_gates(2.5, vocab_size=vocabulary, from_init=True)
    assert all(gate.passed for gate in good)
    refuse_failed(good, where="m.apr")
    for loss, share in ((6.1, False), (math.nan, False), (10.8, False)):
        bad = step_zero_gates(loss, vocab_size=vocabulary, from_init=True)
        assert bad[0].passed is share
        with pytest.raises(LossRefused, match="FALSIFY-APR-PRETRAIN-INIT-006"):
            refuse_failed(bad, where="m.apr")
    assert step_zero_gates(10.8, vocab_size=vocabulary, from_init=False)[0].passed
    assert not step_zero_gates(9.2, vocab_size=vocabulary, from_init=False)[0].passed


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-FINETUNE-003")
def test_an_init_must_beat_seven_tenths_of_chance() -> None:
    share = 0.7 * math.log(512)
    assert step_zero_gates(share - 0.01, vocab_size=512, from_init=True)[1].passed
    assert not step_zero_gates(share + 0.01, vocab_size=512, from_init=True)[1].passed


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-FINETUNE-007")
def test_an_evaluation_on_stale_buffers_or_below_what_a_model_can_know_fails() -> None:
    fresh = Agreement(step=1, train_loss=2.24, eval_loss=2.24 + 5e-5)
    stale = Agreement(step=5, train_loss=2.24, eval_loss=0.685)
    good = evaluation_gates([fresh], val_loss=2.2, train_loss=2.24)
    assert all(gate.passed for gate in good)
    assert not evaluation_gates([fresh, stale], val_loss=2.2, train_loss=2.24)[0].passed
    assert not evaluation_gates([fresh], val_loss=0.685, train_loss=2.24)[1].passed


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-FINETUNE-005")
def test_a_final_loss_at_the_cap_or_not_finite_fails_the_verdict() -> None:
    for loss, passed in ((9.37, True), (9.38, False), (math.inf, False)):
        gates = final_gates(first_val_loss=9.5, val_loss=loss, target=2.2, finetune=True, steps=500)
        assert gates[0].passed is passed
        verdict = Verdict(status=Status.COMPLETED, detail="", gates=tuple(gates), facts={})
        assert (verdict.exit_code is ExitCode.OK) is passed


def test_missing_the_target_is_said_and_does_not_fail_the_run() -> None:
    gates = final_gates(first_val_loss=2.5, val_loss=2.4, target=2.2, finetune=True, steps=5)
    verdict = Verdict(status=Status.COMPLETED, detail="", gates=tuple(gates), facts={})
    assert [gate.passed for gate in gates] == [True, True, False]
    assert verdict.exit_code is ExitCode.OK


def test_an_aborted_run_never_ends_well() -> None:
    assert Verdict(status=Status.ABORTED, detail="", gates=(), facts={}).exit_code is ExitCode.VERDICT


def step_metrics(**changes: float) -> StepMetrics:
    values = {"step": 1, "train_loss": 2.0, "grad_norm": 1.0, "lr": 1e-4, "tokens_per_sec": 9.0, "targets": 9}
    values |= {"gpu_util_pct": 0.0, "wall_ms": 5.0, "data_wait_ms": 0.1, "tokens_seen": 64, "data_epoch": 0}
    values |= {"forward_ms": 1.0, "backward_ms": 2.0, "update_ms": 1.5}
    return StepMetrics(data_epochs={"train": 0}, **(values | changes))  # type: ignore[arg-type]


@pytest.mark.falsifies("INV-TRAIN-001")
def test_every_step_line_has_its_six_figures_and_none_is_null(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "metrics.jsonl", common={}) as metrics:
        metrics.step(step_metrics())
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    for key in ("step", "train_loss", "grad_norm", "lr", "tokens_per_sec", "gpu_util_pct"):
        assert line[key] is not None


@pytest.mark.falsifies("INV-TRAIN-008")
@pytest.mark.parametrize(
    "bad", [{"tokens_per_sec": math.inf}, {"tokens_per_sec": 0.0}, {"wall_ms": math.nan}]
)
def test_a_throughput_that_is_no_figure_stops_the_run(tmp_path: Path, bad: dict[str, float]) -> None:
    with (
        MetricsFile(tmp_path / "metrics.jsonl", common={}) as metrics,
        pytest.raises(NumericalInstability, match="INV-TRAIN-008"),
    ):
        metrics.step(step_metrics(**bad))


def test_metrics_that_cannot_be_written_are_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        MetricsFile(tmp_path / "missing" / "metrics.jsonl", common={})
    with MetricsFile(Path("/dev/full"), common={}) as metrics, pytest.raises(OutputError, match="No space"):
        metrics.step(step_metrics())
