"""A session: everything a run trains with, opened in one order and closed together.

Nobody else puts a model, data, an optimizer and an engine together; the order is in ``opening``. The loop of
a run is in ``trainer``; what is proven before a session opens is in ``proving``; what programs call is in
``library``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch

from apr_dist.config import TrainConfig
from apr_dist.errors import AprDistError, DataError
from apr_dist.gates.updates import refuse_lost_updates
from apr_dist.model.sending import send
from apr_dist.parallel.engine import Engine
from apr_dist.parallel.heartbeat import HERE, Phase
from apr_dist.parallel.live_weights import read_weight, write_weight
from apr_dist.parallel.lost_updates import UpdateSample
from apr_dist.runs.checkpoint import perplexity
from apr_dist.runs.metrics import StepMetrics
from apr_dist.runs.progress import Evaluation
from apr_dist.training.answers import answer_all
from apr_dist.training.efficiency import gpu_utilisation
from apr_dist.training.evaluation import HeldOut, evaluate
from apr_dist.training.garbage import collect
from apr_dist.training.guards import check_targets
from apr_dist.training.opening import Opening
from apr_dist.training.proving import Around, Proven
from apr_dist.training.signals import SIGNALS, StopRequest, first_signal
from apr_dist.training.step_record import StepRecorder
from apr_dist.training.stepping import BatchFeed, Stepper


class Session(Opening):
    """Everything a run trains with.

    Opening one is a collective, as is everything it does; leave it with ``with`` or ``close``.

    Args:
        config: the resolved configuration.
        proven: rank 0's proven inputs.
        around: display, watch, lock and own data.

    Attributes:
        runtime: this rank's view of the processes.
        start: what the run starts from: architecture, provenance, init metadata.
        model: the decoder being trained, its parameters sharded as the strategy says.
        engine: the prepared network and optimizer.
        progress: where the run is.
        gates: the gates that passed so far.
        data: training batches and held-out sequences.

    Raises:
        AprDistError: on every rank alike, for whatever rank 0 refused or a rank found wrong.
    """

    def __init__(self, config: TrainConfig, proven: Proven, around: Around) -> None:
        self.stop_request, self.signal_number = StopRequest(), 0
        self._fixed_lr: float | None = None
        with contextlib.ExitStack() as stack:
            super().__init__(config, proven, around, stack)
            self.stepper = self.make_stepper(self.engine, self.make_feed())
            self._open_recorder()
            self.sample = UpdateSample(self.model, self.engine.optimizer, self.runtime)
            self._stack = stack.pop_all()

    def make_stepper(self, engine: Engine, feed: BatchFeed) -> Stepper:
        """What takes this session's steps, over an engine and a feed."""
        config = self.config
        uncounted = config.loader.ignored_ids or self.data.train.flagged
        return Stepper(
            engine=engine,
            runtime=self.runtime,
            feed=feed,
            lr_at=lambda step: self.schedule.lr_at(step) if self._fixed_lr is None else self._fixed_lr,
            global_tokens=None if uncounted else config.batch_size * config.seq_length,
            notes=self._notes,
            limits=self._guard.limits,
        )

    def _open_recorder(self) -> None:
        done = self.data.train.progress(self.progress.step)
        self.progress.data_epochs = {name: one.newest_pass for name, one in done.items()}
        cuda = self.runtime.device.type == "cuda"
        self.log_every = 1 if self._guard.each_step else self.config.log_every or (10 if cuda else 1)
        self.recorder = StepRecorder(
            runtime=self.runtime,
            progress=self.progress,
            train_data=self.data.train,
            positions=self.config.batch_size * self.config.seq_length,
            guard=self._guard,
            go_on=self.stepper.go_on,
            efficiency=self.efficiency,
            metrics=self.metrics,
            display=self.display,
        )

    # --- closing ------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: Any) -> None:
        self._stack.__exit__(*failure)

    def close(self) -> None:
        """Finish the save under way and close data, metrics and trackers."""
        self.__exit__(None, None, None)

    def closes_with(self, outer: contextlib.ExitStack) -> None:
        """Close what a session was opened within, such as its lock, after the session itself."""
        inner, self._stack = self._stack, outer
        outer.push(inner.__exit__)

    # --- steps --------------------------------------------------------------------------------------

    @property
    def lr(self) -> float:
        """The learning rate of the next step. Setting it overrides the schedule until ``follow_schedule``."""
        return self.schedule.lr_at(self.progress.step) if self._fixed_lr is None else self._fixed_lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._fixed_lr = float(value)

    def follow_schedule(self) -> None:
        """Take the learning rate from the configured schedule again."""
        self._fixed_lr = None

    def weight(self, name: str) -> torch.Tensor:
        """A copy of one whole parameter, f32, on the CPU of every rank; a collective.

        Raises:
            UsageError: there is no such parameter.
        """
        return read_weight(self.model, name, self.runtime)

    def set_weight(self, name: str, values: torch.Tensor) -> None:
        """Replace one whole parameter with the same values on every rank; a collective.

        Raises:
            UsageError: there is no such parameter, or ``values`` has another shape.
        """
        write_weight(self.model, name, values, self.runtime)

    def steps(self, until: int | None = None) -> Iterator[StepMetrics]:
        """Take optimizer steps and yield what each measured.

        Args:
            until: number of the last step, from 1; None: the configuration's ``num_steps``.

        Raises:
            NumericalInstability, DataError, OutputError: as in a run.
        """
        last = self.config.num_steps if until is None else until
        while self.progress.step < last:
            yield from self.step(last=last)

    def step(self, *, last: int) -> list[StepMetrics]:
        """Take one optimizer step; returns what the steps measured that were read with it.

        Figures are read every ``log_every`` steps, at ``last``, and before anything that depends on them.
        """
        state, final = self.progress, self.config.num_steps
        HERE.enter(Phase.TRAINING, step=state.step)
        drops = self.model.adapter is not None and self.model.adapter.dropout > 0
        # An adapter begins at zero; later its dropout makes the two losses differ.
        compare = state.step == 0 or (state.step == final - 1 and not drops)
        sampled = self._is_evaluated(state.step + 1) and self.sample.can_measure
        try:
            if sampled:
                self.sample.look()
            self.stepper.take(state.step, compare=compare, more=state.step + 1 < final)
            if sampled:
                lost = self.sample.compare()
                state.updates_lost = None if lost is None else lost.to_json()
        except AprDistError:
            self._read_figures()  # of the steps before, which are done
            raise
        state.step += 1
        if compare or state.step == last or self.stepper.waiting >= self.log_every:
            return self._read_figures()
        return []

    def _is_evaluated(self, step: int) -> bool:
        return step % self.config.eval_every == 0 or step == self.config.num_steps

    def _read_figures(self) -> list[StepMetrics]:
        """Record the steps taken since the last time.

        Raises:
            NumericalInstability, DataError: a step had no loss or no norm; it and those after it changed
                nothing.
            OutputError: a save that was going on has failed, on any rank.
        """
        lines, failures = [], 0.0
        gpu_util = gpu_utilisation(self.runtime.device)
        for taken in self.stepper.read():
            check_targets(step=taken.step + 1, targets=taken.targets)
            lines.append(self.recorder.judge(taken, gpu_util))
            failed, *signals = taken.notes
            failures += failed
            self.signal_number = self.signal_number or first_signal(signals)
        if failures:
            self.saver.finish()
        return [line for line in lines if line is not None]

    def signals(self) -> torch.Tensor:
        """One for each signal that came to this rank, f64, to be summed over all ranks."""
        asked = [float(self.stop_request.received == number) for number in SIGNALS]
        return send(torch.tensor(asked, dtype=torch.float64), self.runtime.device)

    def _notes(self) -> torch.Tensor:
        """What each rank has to tell all others: that a save failed here, and which signals came."""
        failed = torch.tensor([float(self.saver.failed)], dtype=torch.float64)
        return torch.cat((send(failed, self.runtime.device), self.signals()))

    # --- evaluation and saving ----------------------------------------------------------------------

    def evaluate(self, check: Callable[[Evaluation], None] = lambda _: None) -> Evaluation:
        """Measure the held-out loss of the present weights, and record it.

        Args:
            check: called with the result before it becomes part of the run's progress.

        Raises:
            EvaluationStopped: a signal came to any rank while a run's loop evaluated.
            DataError: the session has no held-out data.
        """
        if self.data.held_out is None:
            raise DataError(
                "there are no held-out data",
                expected="val_dataset, or val_batches of the program",
                remedy="open the session with one of them",
            )
        collect()
        state, number = self.progress, len(self.progress.evaluations)
        with HERE.during(Phase.EVALUATION, step=state.step):
            result = self._measured(self.data.held_out)
            further = {name: self._measured(one) for name, one in self.data.further.items()}
        self.metrics.event(
            "evaluation",
            {
                "step": state.step,
                "evaluation": number,
                "val_loss": result.loss if result.is_finite else None,
                "val_ppl": perplexity(result.loss),
                "tokens": result.tokens,
                "wall_ms": (result.wall_s + sum(one.wall_s for one in further.values())) * 1e3,
                "updates_lost": state.updates_lost,
                **_losses_by_name(further),
            },
        )
        if state.updates_lost is not None:
            refuse_lost_updates(
                state.updates_lost["below_half_ulp"], self.config.memory.weights, step=state.step
            )
        check(result)
        state.evaluations.append(result)
        state.evaluated_at = state.step
        self._answer_prompts()
        return result

    def _measured(self, held_out: HeldOut) -> Evaluation:
        return evaluate(
            self.engine.evaluated,
            held_out,
            self.runtime,
            progress=self.display.evaluating,
            ignored_ids=self.config.loader.ignored_ids,
            stop=self._asked_to_stop,
        )

    def _answer_prompts(self) -> None:
        """Record what the present weights answer to the prompts of the run, if it has any."""
        if self.questions is None:
            return
        with HERE.during(Phase.EVALUATION, step=self.progress.step):
            line = answer_all(
                self.questions, self.model, self.engine.evaluated, self.runtime, stop=self._asked_to_stop
            )
        self.metrics.event("answers", {"step": self.progress.step, **line})

    def _asked_to_stop(self) -> bool:
        """Whether a signal came to any rank; a collective."""
        return bool(first_signal(self.runtime.sum(self.signals()).tolist()))

    def save(self) -> None:
        """Save model, optimizer and progress as a step folder; written in the background where it fits.

        Raises:
            AprDistError: what went wrong in the save before, or in this one so far.
        """
        began = time.perf_counter()
        with HERE.during(Phase.SAVING, step=self.progress.step):
            self.saver.save(self.model, self.engine.optimizer, self.progress)
        wall_ms = (time.perf_counter() - began) * 1e3
        self.metrics.event("save", {"step": self.progress.step, "wall_ms": wall_ms})


def _losses_by_name(further: Mapping[str, Evaluation]) -> dict[str, Any]:
    """What an evaluation line says of the named sets that do not count; nothing without any."""
    if not further:
        return {}
    return {"val_losses": {name: one.loss if one.is_finite else None for name, one in further.items()}}
