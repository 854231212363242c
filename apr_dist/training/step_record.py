"""What became of each step: a line of metrics, a skip that is counted, or the end of the run.

Figures come from ``stepping`` once they were read from the device; which of them end a run is for
``step_guard``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from apr_dist.errors import NumericalInstability
from apr_dist.gates.losses import Agreement
from apr_dist.parallel.runtime import Runtime
from apr_dist.runs.display import Display
from apr_dist.runs.metrics import MetricsFile, StepMetrics
from apr_dist.runs.progress import Progress
from apr_dist.training.efficiency import Efficiency, host_peak_bytes, peak_bytes
from apr_dist.training.step_guard import SkipStep, StepGuard
from apr_dist.training.stepping import Taken, TrainingData


class StepRecorder:
    """Writes down the steps of one run, in order.

    Args:
        runtime: this rank's view of the processes.
        progress: where the run is; counted on here.
        train_data: whose passes over each source are told.
        positions: tokens of a global batch, targets or not.
        guard: says whether a step happened.
        go_on: lets steps change weights again after one that was skipped.
        efficiency: what a token costs.
        metrics: where lines go.
        display: what a person sees on rank 0.
    """

    def __init__(
        self,
        *,
        runtime: Runtime,
        progress: Progress,
        train_data: TrainingData,
        positions: int,
        guard: StepGuard,
        go_on: Callable[[], None],
        efficiency: Efficiency,
        metrics: MetricsFile,
        display: Display,
    ) -> None:
        self._runtime, self._progress, self._train_data = runtime, progress, train_data
        self._guard, self._go_on, self._efficiency = guard, go_on, efficiency
        self._metrics, self._display, self._positions = metrics, display, positions

    def judge(self, taken: Taken, gpu_util_pct: float) -> StepMetrics | None:
        """Record a step that happened and return its line; or that it was skipped, or why it ends the run.

        Raises:
            NumericalInstability: the guard takes the step for the run's last.
        """
        try:
            self._guard.check(batch=taken.step, train_loss=taken.train_loss, grad_norm=taken.grad_norm)
        except SkipStep as skipped:
            self._go_on()
            self._count_passes(taken.step + 1)
            self._metrics.event("skipped", {**skipped.facts, "why": skipped.why, "lr": taken.lr})
            of = f"{self._guard.state.skipped} of at most {self._guard.options.max_skipped}"
            self._display(f"step {taken.step + 1:>6}  skipped ({of}): {skipped.why}")
            return None
        except NumericalInstability as error:
            self._metrics.event("refused", error.facts)
            error.told_by_rank_0 = not self._runtime.is_main  # every rank has the same figures
            raise
        return self._record(taken, gpu_util_pct)

    def _record(self, taken: Taken, gpu_util_pct: float) -> StepMetrics:
        state = self._progress
        state.tokens_seen += taken.targets
        state.train_loss = taken.train_loss
        state.grad_norm_max = max(state.grad_norm_max, taken.grad_norm)
        self._count_passes(taken.step + 1)
        speed = self._positions / taken.wall_s
        line = StepMetrics(
            step=taken.step + 1,
            train_loss=taken.train_loss,
            grad_norm=taken.grad_norm,
            lr=taken.lr,
            tokens_per_sec=speed,
            gpu_util_pct=gpu_util_pct,
            wall_ms=taken.wall_s * 1e3,
            data_wait_ms=taken.data_wait_s * 1e3,
            forward_ms=taken.forward_s * 1e3,
            backward_ms=taken.backward_s * 1e3,
            update_ms=taken.update_s * 1e3,
            targets=taken.targets,
            tokens_seen=state.tokens_seen,
            data_epoch=max(state.data_epochs.values()),
            data_epochs=dict(state.data_epochs),
            mfu=self._efficiency.mfu(speed),
            memory_bytes=peak_bytes(self._runtime.device),
            host_memory_bytes=host_peak_bytes(),
        )
        self._metrics.step(line)
        if taken.eval_loss is not None:
            both = Agreement(step=line.step, train_loss=taken.train_loss, eval_loss=taken.eval_loss)
            state.agreements.append(both)
            self._metrics.event("agreement", asdict(both))
        return line

    def _count_passes(self, steps: int) -> None:
        """Say when a source of the training data begins again."""
        state = self._progress
        for name, progress in self._train_data.progress(steps).items():
            newest = progress.newest_pass
            if newest > state.data_epochs.get(name, 0):
                self._display(f"training data {name}: pass {newest + 1} begins")
            state.data_epochs[name] = newest
