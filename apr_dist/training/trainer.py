"""The loop: evaluate, step, evaluate, save, and say how it ended.

What a step is, is in ``stepping``. Processes, weights, guards, metrics and the verdict live in their own
rooms; nothing here opens a model file or parses a flag.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from apr_dist.choices import Documents, Offload, Strategy
from apr_dist.config import TrainConfig
from apr_dist.errors import AprDistError
from apr_dist.gates.losses import (
    evaluation_gates,
    final_gates,
    random_start_gates,
    refuse_failed,
    step_zero_gates,
)
from apr_dist.gates.result import GateResult
from apr_dist.model.sending import send
from apr_dist.model.transformer import Decoder
from apr_dist.parallel.engine import prepare
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.weights import model_digest
from apr_dist.parallel.whereabouts import HERE, Phase
from apr_dist.runs.checkpoint import perplexity
from apr_dist.runs.display import Display, Pace
from apr_dist.runs.metrics import MetricsFile
from apr_dist.runs.progress import Evaluation, Progress, Start
from apr_dist.runs.saving import Saver
from apr_dist.runs.step_folders import SavedState
from apr_dist.runs.verdict import Status
from apr_dist.training.compute import set_up_compute
from apr_dist.training.efficiency import (
    device_name,
    efficiency_of,
    gpu_utilisation,
    launch_text,
)
from apr_dist.training.evaluation import EvaluationStopped, evaluate
from apr_dist.training.garbage import collect, collected_on_request
from apr_dist.training.guards import EarlyStop, check_targets, check_validation
from apr_dist.training.optimizer import build_optimizer
from apr_dist.training.recording import StepRecorder
from apr_dist.training.schedule import schedule_of
from apr_dist.training.signals import SIGNALS, StopRequest, first_signal
from apr_dist.training.step_guard import StepGuard
from apr_dist.training.stepping import BatchFeed, Stepper, TrainingData


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the loop ended."""

    status: Status
    detail: str
    gates: list[GateResult]
    facts: dict[str, Any]


class Trainer:
    """One run over prepared processes, data and weights.

    Args:
        config: the resolved configuration.
        runtime: this rank's view of the processes.
        model: the bare decoder, its weights in place.
        start: what it starts from.
        train_data: global batches by number.
        eval_data: this rank's share of the held-out sequences, iterated once an evaluation.
        metrics: where lines go.
        saver: writes step folders.
        display: what a person sees on rank 0; it hears of steps and evaluations from ``metrics``.
        resumed: state of the step folder to go on from; None begins at step 0.
    """

    def __init__(
        self,
        *,
        config: TrainConfig,
        runtime: Runtime,
        model: Decoder,
        start: Start,
        train_data: TrainingData,
        eval_data: Iterable[torch.Tensor],
        metrics: MetricsFile,
        saver: Saver,
        display: Display,
        resumed: SavedState | None = None,
    ) -> None:
        self.config, self.runtime, self.start = config, runtime, start
        self.train_data, self.eval_data = train_data, eval_data
        self.metrics, self.saver, self.display = metrics, saver, display
        self.model, self.stop_request = model, StopRequest()
        self.progress = Progress() if resumed is None else Progress.from_saved(resumed)
        if resumed is not None:
            done = train_data.progress(resumed.step)
            self.progress.data_epochs = {name: one.newest_pass for name, one in done.items()}
        guard = StepGuard(config.guards, batch_size=config.batch_size, state=self.progress.guard)
        self._saved = self._place
        self.began = time.perf_counter()
        set_up_compute(model, config, runtime.device)
        options = config.optimizer
        optimizer = build_optimizer(
            model,
            lr=config.peak_lr,
            weight_decay=options.weight_decay,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            alone=runtime.strategy is Strategy.SINGLE,
            offloaded=runtime.strategy.zero_stage > 0 and runtime.offload is not Offload.NONE,
            state_bits=options.state_bits,
        )
        self.schedule = schedule_of(config)
        micro_batch = config.micro_batch(runtime.world_size)
        self.engine = prepare(model, optimizer, runtime, micro_batch=micro_batch, grad_clip=options.grad_clip)
        self.efficiency = efficiency_of(start.model_config, config, runtime)
        self._launching = True
        self.log_every = config.log_every or (10 if runtime.device.type == "cuda" else 1)
        if guard.each_step:
            self.log_every = 1
        ignored, isolate = config.loader.ignored_ids, config.loader.documents is Documents.ISOLATE
        self.stepper = Stepper(
            engine=self.engine,
            runtime=runtime,
            feed=BatchFeed(train_data, runtime.device, ignored_ids=ignored, isolate=isolate),
            lr_at=self.schedule.lr_at,
            global_tokens=None if ignored else config.batch_size * config.seq_length,
            notes=self._notes,
            limits=guard.limits,
        )
        self.recorder = StepRecorder(
            runtime=runtime,
            progress=self.progress,
            train_data=train_data,
            guard=guard,
            go_on=self.stepper.go_on,
            efficiency=self.efficiency,
            metrics=metrics,
            display=display,
        )

    def advance_to(self, batch: int) -> None:
        """Take the steps before global batch ``batch``, without evaluating or saving."""
        while self.progress.step < batch:
            self._step(last=batch)

    def fit(self) -> Outcome:
        """Train to the end of the steps, the target, or the patience.

        Raises:
            LossRefused, Divergence, NumericalInstability, DataError, OutputError: see ``guards`` and
                ``verdict``; the last step folder that was written stays whole.
            Interrupted, Terminated: a signal came to any rank; the step just finished was saved.
        """
        state, stop = (
            self.progress,
            EarlyStop(self.config.early_stop.patience, self.config.early_stop.min_evaluations),
        )
        self.display(self.efficiency.describe())
        pace = Pace(steps=self.config.num_steps, eval_every=self.config.eval_every, done=state.step)
        with (
            self.display.training(pace),
            self.stop_request,
            self.saver,
            collected_on_request(),
        ):
            if not state.evaluations:
                self._step_zero()
            for done in state.evaluations:
                stop = stop.after(done.loss)
            if self._stopped_before_evaluating():
                stop = stop.after(self._evaluate_and_save())
            ended = self._ended(stop) if state.evaluation else None
            while ended is None and state.step < self.config.num_steps:
                self._stop_if_asked()
                self._train_to_evaluation()
                stop = stop.after(self._evaluate_and_save())
                ended = self._ended(stop)
            self._save_what_is_new()
        HERE.enter(Phase.ENDING)
        status, detail = ended or (Status.COMPLETED, f"all {self.config.num_steps} steps done")
        return self._outcome(status, detail)

    def _step_zero(self) -> None:
        try:
            first = self._evaluate()
        except EvaluationStopped:
            self._stop_if_asked()
            raise
        if not self.config.synthetic:
            self.progress.first_gates = step_zero_gates(
                first.loss,
                vocab_size=self.start.model_config.vocab_size,
                from_init=self.start.from_init,
                recorded=self.start.recorded_val_loss,
            )
            self.progress.first_gates += self._random_gates()
            refuse_failed(self.progress.first_gates, where=str(self.config.init or self.config.model))
        if self.config.num_steps == 0:
            self._save()

    def _random_gates(self) -> list[GateResult]:
        measured = self.start.random_start
        if measured is None:
            return []
        self.metrics.event("random-weights", {"step": 0, **measured.to_json()})
        vocab_size = self.start.model_config.vocab_size
        return random_start_gates(**measured.to_json(), vocab_size=vocab_size)

    def _train_to_evaluation(self) -> None:
        """Steps up to the next multiple of ``eval_every``, wherever the run stands, with the saves due."""
        state, total = self.progress, self.config.num_steps
        evaluated = _next_multiple(state.step, self.config.eval_every, total)
        while state.step < evaluated:
            last = _next_multiple(state.step, self.config.save_period, evaluated)
            while state.step < last:
                signal_number = self._step(last=last)
                if signal_number:
                    self._save()
                    self.saver.finish()
                    raise self.stop_request.as_error(signal_number, step=state.step)
            if last < evaluated:
                self._save()

    def _stopped_before_evaluating(self) -> bool:
        """Whether a signal ended this run between a step and the evaluation due after it."""
        state = self.progress
        due = state.step % self.config.eval_every == 0 or state.step == self.config.num_steps
        return due and state.evaluated_at < state.step

    def _stop_if_asked(self) -> None:
        """End the run here, its state saved, when a signal came to any rank."""
        number = first_signal(self.runtime.sum(self._signals()).tolist())
        if number:
            self._save_what_is_new()
            self.saver.finish()
            raise self.stop_request.as_error(number, step=self.progress.step)

    def _signals(self) -> torch.Tensor:
        """One for each signal that came to this rank, to be summed over all ranks."""
        asked = [float(self.stop_request.received == number) for number in SIGNALS]
        return send(torch.tensor(asked, dtype=torch.float64), self.runtime.device)

    def _notes(self) -> torch.Tensor:
        """What each rank has to tell all others: that a save failed here, and which signals came."""
        failed = torch.tensor([float(self.saver.failed)], dtype=torch.float64)
        return torch.cat((send(failed, self.runtime.device), self._signals()))

    def _step(self, *, last: int) -> int:
        """One optimizer step; returns the number of a signal that came to any rank, or 0.

        Figures are read every ``log_every`` steps, and before anything that depends on them.
        """
        state = self.progress
        HERE.enter(Phase.TRAINING, step=state.step)
        compare = state.step in (0, self.config.num_steps - 1)
        try:
            self.stepper.take(state.step, compare=compare, more=state.step + 1 < self.config.num_steps)
        except AprDistError:
            self._read_figures()  # of the steps before, which are done
            raise
        state.step += 1
        if compare or state.step == last or self.stepper.waiting >= self.log_every:
            return self._read_figures()
        return 0

    def _read_figures(self) -> int:
        """Record the steps taken since the last time; returns the number of a signal, or 0.

        Raises:
            NumericalInstability, DataError: a step had no loss or no norm; it and those after it changed
                nothing.
            OutputError: a save that was going on has failed, on any rank.
        """
        failures, signal_number = 0.0, 0
        gpu_util = gpu_utilisation(self.runtime.device)
        for taken in self.stepper.read():
            check_targets(step=taken.step + 1, targets=taken.targets)
            self.recorder.judge(taken, gpu_util)
            failed, *signals = taken.notes
            failures += failed
            signal_number = signal_number or first_signal(signals)
        if failures:
            self.saver.finish()
        if self._launching:
            self._launching = False
            self.display(launch_text())
        return signal_number

    def _evaluate_and_save(self) -> float:
        """The validation loss of this step, saved with it where a save is due; on a signal, without it."""
        try:
            loss = self._evaluate().loss
        except EvaluationStopped:
            self._save()
            self._stop_if_asked()
            raise
        if self.progress.step % self.config.save_period == 0:
            self._save()
        return loss

    def _evaluate(self) -> Evaluation:
        collect()
        state, number = self.progress, len(self.progress.evaluations)
        with HERE.during(Phase.EVALUATION, step=state.step):
            result = evaluate(
                self.engine.evaluated,
                self.eval_data,
                self.runtime,
                progress=self.display.evaluating,
                ignored_ids=self.config.loader.ignored_ids,
                stop=lambda: bool(first_signal(self.runtime.sum(self._signals()).tolist())),
            )
        self.metrics.event(
            "evaluation",
            {
                "step": state.step,
                "evaluation": number,
                "val_loss": result.loss if math.isfinite(result.loss) else None,
                "val_ppl": perplexity(result.loss),
                "tokens": result.tokens,
                "wall_ms": result.wall_s * 1e3,
            },
        )
        check_validation(
            val_loss=result.loss,
            previous=state.evaluations[-1].loss if state.evaluations else None,
            vocab_size=self.start.model_config.vocab_size,
            from_scratch=not self.start.from_init,
            evaluation=number,
        )
        state.evaluations.append(result)
        state.evaluated_at = state.step
        return result

    def _ended(self, stop: EarlyStop) -> tuple[Status, str] | None:
        state = self.progress
        loss = state.val_loss
        if loss <= self.config.target and state.evaluation >= self.config.early_stop.min_evaluations:
            return Status.OK, f"validation loss {loss:.4f} reached the target {self.config.target}"
        if stop.stops(state.evaluation):
            return (
                Status.EARLY_STOP,
                f"best validation loss {stop.best:.4f}; {stop.without_improvement} without improvement",
            )
        return None

    @property
    def _place(self) -> tuple[int, int]:
        """Steps and evaluations done: what tells two saves apart."""
        return self.progress.step, len(self.progress.evaluations)

    def _save_what_is_new(self) -> None:
        if self.progress.step and self._saved != self._place:
            self._save()

    def _save(self) -> None:
        began = time.perf_counter()
        with HERE.during(Phase.SAVING, step=self.progress.step):
            self.saver.save(self.model, self.engine.optimizer, self.progress)
        self._saved = self._place
        wall_ms = (time.perf_counter() - began) * 1e3
        self.metrics.event("save", {"step": self.progress.step, "wall_ms": wall_ms})

    def _outcome(self, status: Status, detail: str) -> Outcome:
        state, config = self.progress, self.config
        gates = list(state.first_gates)
        if not config.synthetic:
            gates += evaluation_gates(state.agreements, val_loss=state.val_loss, train_loss=state.train_loss)
            gates += final_gates(
                first_val_loss=state.evaluations[0].loss,
                val_loss=state.val_loss,
                target=config.target,
                finetune=self.start.from_init,
                steps=state.step,
            )
        facts = {
            "steps": state.step,
            "tokens_seen": state.tokens_seen,
            "skipped_steps": state.guard.skipped,
            "data": {name: asdict(one) for name, one in self.train_data.progress(state.step).items()},
            "train_loss": state.train_loss,
            "val_losses": [result.loss for result in state.evaluations],
            "wall_seconds": time.perf_counter() - self.began,
            "weights_digest": model_digest(self.model, self.runtime),
            "strategy": self.runtime.strategy.value,
            **self.engine.evidence,
            "world_size": self.runtime.world_size,
            "device": device_name(self.runtime.device),
        }
        return Outcome(status=status, detail=detail, gates=gates, facts=facts)


def _next_multiple(step: int, period: int, limit: int) -> int:
    """The first multiple of ``period`` after ``step``, or ``limit`` before it."""
    return min((step // period + 1) * period, limit)
