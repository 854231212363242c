"""The loop of a run: evaluate, step, evaluate, save, and say how it ended.

What a step is, is in ``stepping``; what it is taken with, in ``session``. Nothing here opens a file or parses
a flag.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from apr_dist.apr.digests import file_weights_digest
from apr_dist.apr.reader import AprReader
from apr_dist.atomic_files import write_atomically
from apr_dist.choices import FinalCheckpoint
from apr_dist.gates.losses import (
    evaluation_gates,
    final_gates,
    random_start_gates,
    refuse_failed,
    step_zero_gates,
)
from apr_dist.gates.result import GateResult
from apr_dist.gates.updates import updates_gate
from apr_dist.parallel.heartbeat import HERE, Phase
from apr_dist.parallel.weights import model_digest
from apr_dist.runs.checkpoint import json_bytes
from apr_dist.runs.display import Pace
from apr_dist.runs.progress import Evaluation
from apr_dist.runs.verdict import Status, Verdict
from apr_dist.training.efficiency import device_name, launch_text
from apr_dist.training.evaluation import EvaluationStopped
from apr_dist.training.garbage import collected_on_request
from apr_dist.training.guards import EarlyStop, check_validation
from apr_dist.training.session import Session
from apr_dist.training.signals import first_signal


def train(session: Session) -> Verdict:
    """Train to the end of the steps, the target, or the patience, and leave a verdict.

    Raises:
        LossRefused, Divergence, NumericalInstability, DataError, OutputError: see ``guards`` and
            ``gates.losses``; the last step folder that was written stays whole.
        Interrupted, Terminated: a signal came to any rank; the step just finished was saved.
    """
    status, detail = _Loop(session).fit()
    verdict = _verdict(session, status, detail)
    session.runtime.on_main(lambda: write_atomically(session.run.verdict, json_bytes(verdict.to_json())))
    return verdict


class _Loop:
    """One run of a session from where its progress is to its end."""

    def __init__(self, session: Session) -> None:
        self.session, self.config, self.progress = session, session.config, session.progress
        options = self.config.early_stop
        self._stop = EarlyStop(options.patience, options.min_evaluations)
        self._launching, self._saved = True, self._place

    def fit(self) -> tuple[Status, str]:
        """Train, evaluate and save until the run has ended; how it did, and why."""
        session, state, steps = self.session, self.progress, self.config.num_steps
        session.display(session.efficiency.describe())
        pace = Pace(steps=steps, eval_every=self.config.eval_every, done=state.step)
        with session.display.training(pace), session.stop_request, collected_on_request():
            if not state.evaluations:
                self._first_evaluation()
            for done in state.evaluations:
                self._stop = self._stop.after(done.loss)
            if self._stopped_before_evaluating():
                self._evaluate_and_save()
            ended = self._ended() if state.evaluation else None
            while ended is None and state.step < steps:
                self._stop_if_asked()
                self._train_to_evaluation()
                self._evaluate_and_save()
                ended = self._ended()
            self._save_what_is_new()
            session.saver.finish()
        HERE.enter(Phase.ENDING)
        return ended or (Status.COMPLETED, f"all {steps} steps done")

    def _first_evaluation(self) -> None:
        """Evaluate before the first step; or, of a resumed run on other held-out data, before the next."""
        session = self.session
        try:
            first = self._evaluate()
        except EvaluationStopped:
            self._stop_if_asked()
            raise
        if not self.config.synthetic and self.progress.step == 0:
            gates = step_zero_gates(
                first.loss,
                vocab_size=session.start.model_config.vocab_size,
                from_init=session.start.from_init,
                recorded=session.start.recorded_val_loss,
            )
            self.progress.first_gates = [*gates, *self._random_gates()]
            refuse_failed(self.progress.first_gates, where=str(self.config.init or self.config.model))
        if self.config.num_steps == 0:
            self._save()

    def _random_gates(self) -> list[GateResult]:
        session = self.session
        measured = session.start.random_start
        if measured is None:
            return []
        session.metrics.event("random-weights", {"step": 0, **measured.to_json()})
        return random_start_gates(**measured.to_json(), vocab_size=session.start.model_config.vocab_size)

    def _train_to_evaluation(self) -> None:
        """Steps up to the next multiple of ``eval_every``, wherever the run stands, with the saves due."""
        state, evaluated = (
            self.progress,
            _next_multiple(self.progress.step, self.config.eval_every, self.config.num_steps),
        )
        while state.step < evaluated:
            last = _next_multiple(state.step, self.config.save_period, evaluated)
            self._train_to(last)
            if last < evaluated:
                self._save()

    def _train_to(self, last: int) -> None:
        """Steps up to ``last``; on a signal, save the step just finished and end.

        Raises:
            Interrupted, Terminated: a signal came to any rank.
        """
        session, state = self.session, self.progress
        while state.step < last:
            if session.step(last=last) and self._launching:
                self._launching = False
                session.display(launch_text())
            if session.signal_number:
                self._save()
                session.saver.finish()
                raise session.stop_request.as_error(session.signal_number, step=state.step)

    def _stopped_before_evaluating(self) -> bool:
        """Whether a signal ended this run between a step and the evaluation due after it."""
        state = self.progress
        due = state.step % self.config.eval_every == 0 or state.step == self.config.num_steps
        return due and state.evaluated_at < state.step

    def _stop_if_asked(self) -> None:
        """End the run here, its state saved, when a signal came to any rank."""
        session = self.session
        number = first_signal(session.runtime.sum(session.signals()).tolist())
        if number:
            self._save_what_is_new()
            session.saver.finish()
            raise session.stop_request.as_error(number, step=self.progress.step)

    def _evaluate_and_save(self) -> None:
        """Evaluate, and save what was evaluated if a save is due; on a signal, save without it and end."""
        try:
            loss = self._evaluate().loss
        except EvaluationStopped:
            self._save()
            self._stop_if_asked()
            raise
        if self.progress.step % self.config.save_period == 0:
            self._save()
        self._stop = self._stop.after(loss)

    @property
    def _place(self) -> tuple[int, int]:
        """Steps and evaluations done: what tells two saves apart."""
        return self.progress.step, len(self.progress.evaluations)

    def _save_what_is_new(self) -> None:
        if self.progress.step and self._saved != self._place:
            self._save()

    def _save(self) -> None:
        self.session.save()
        self._saved = self._place

    def _evaluate(self) -> Evaluation:
        session, state = self.session, self.progress

        def check(result: Evaluation) -> None:
            check_validation(
                val_loss=result.loss,
                previous=state.evaluations[-1].loss if state.evaluations else None,
                vocab_size=session.start.model_config.vocab_size,
                from_scratch=not session.start.from_init,
                evaluation=len(state.evaluations),
            )

        return session.evaluate(check)

    def _ended(self) -> tuple[Status, str] | None:
        state, stop = self.progress, self._stop
        loss = state.val_loss
        if loss <= self.config.target and state.evaluation >= self.config.early_stop.min_evaluations:
            return Status.OK, f"validation loss {loss:.4f} reached the target {self.config.target}"
        if stop.stops(state.evaluation):
            return (
                Status.EARLY_STOP,
                f"best validation loss {stop.best:.4f}; {stop.without_improvement} without improvement",
            )
        return None


def _next_multiple(step: int, period: int, limit: int) -> int:
    """The first multiple of ``period`` after ``step``, or ``limit`` before it."""
    return min((step // period + 1) * period, limit)


def _verdict(session: Session, status: Status, detail: str) -> Verdict:
    state, config, runtime = session.progress, session.config, session.runtime
    handed_over = runtime.on_main(lambda: _hand_over(session))
    gates = list(state.first_gates)
    if not config.synthetic:
        gates += evaluation_gates(state.agreements, val_loss=state.val_loss, train_loss=state.train_loss)
        gates += final_gates(
            first_val_loss=state.evaluations[0].loss,
            val_loss=state.val_loss if handed_over["val_loss"] is None else handed_over["val_loss"],
            target=config.target,
            finetune=session.start.from_init,
            steps=state.step,
        )
    if state.updates_lost is not None:
        gates.append(updates_gate(state.updates_lost["below_half_ulp"], config.memory.weights))
    facts = {
        **session.start.provenance,
        "config_digest": config.digest(),
        "run": session.start.run,
        "steps": state.step,
        "tokens_seen": state.tokens_seen,
        "skipped_steps": state.guard.skipped,
        "data": {name: asdict(one) for name, one in session.data.train.progress(state.step).items()},
        "train_loss": state.train_loss,
        "val_losses": [result.loss for result in state.evaluations],
        "updates_lost": state.updates_lost,
        "wall_seconds": time.perf_counter() - session.began,
        "weights_digest": model_digest(session.model, runtime),
        "strategy": runtime.strategy.value,
        **session.engine.evidence,
        "world_size": runtime.world_size,
        "device": device_name(runtime.device),
        "checkpoint": str(session.run.checkpoint),
        **handed_over["facts"],
    }
    return Verdict(
        status=status,
        detail=detail + handed_over["text"],
        gates=tuple(session.gates + gates),
        facts=facts,
        synthetic=config.synthetic,
    )


def _hand_over(session: Session) -> dict[str, Any]:
    """Let ``checkpoint.apr`` be the step that ``checkpoint.final`` names; rank 0 alone.

    Returns:
        validation loss of another step than the last if that is handed over, facts for the verdict, and
        words for its detail.
    """
    last, found = session.progress.step, session.saver.best()
    facts: dict[str, Any] = {"checkpoint_step": last}
    if found is None or session.config.synthetic:
        return {"val_loss": None, "facts": facts, "text": ""}
    folder, loss = found
    facts["best"] = {"step": folder.step, "val_loss": loss, "folder": str(folder.path)}
    if folder.step == last:
        return {"val_loss": None, "facts": facts, "text": ""}
    text = f"; the best step is {folder.step}, with validation loss {loss:.4f}"
    if session.config.checkpoint.final is not FinalCheckpoint.BEST:
        return {"val_loss": None, "facts": facts, "text": f"{text}, kept in {folder.path}"}
    session.saver.hand_over(folder)
    with AprReader(folder.checkpoint) as reader:
        facts |= {"checkpoint_step": folder.step, "weights_digest": file_weights_digest(reader)}
    return {"val_loss": loss, "facts": facts, "text": f"{text}, and is what checkpoint.apr holds"}
