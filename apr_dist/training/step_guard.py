"""The guard of one optimizer step: whether its update happens, is left out, or ends the run.

It judges by the loss of the global batch and its gradient norm, which are the same on every rank, so every
rank decides alike. The limits it sets are applied where the figures are, before a weight is touched
(``stepping``); what follows is decided when they are read. What is judged at an evaluation is in ``guards``.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from apr_dist.choices import OnNonFinite, OnSpike, SpikeOf
from apr_dist.config.sections import GuardsSection
from apr_dist.errors import NumericalInstability
from apr_dist.runs.progress import GuardState

NON_FINITE = "INV-TRAIN-007"


class SkipStep(Exception):
    """A step whose update was left out; the run goes on as if its batch were not in the data.

    Attributes:
        why: in words.
        facts: figures to log.
    """

    def __init__(self, why: str, facts: dict[str, Any]) -> None:
        super().__init__(why)
        self.why, self.facts = why, facts


class StepGuard:
    """Judges every step before its update.

    Args:
        options: what to do when.
        batch_size: sequences of a global batch.
        origin: global batch and sequence from which on that size counts.
        state: what it remembers; kept up to date.
    """

    def __init__(
        self,
        options: GuardsSection,
        *,
        batch_size: int,
        state: GuardState,
        origin: tuple[int, int] = (0, 0),
    ) -> None:
        self.options, self._batch_size, self._origin, self.state = options, batch_size, origin, state

    @property
    def each_step(self) -> bool:
        """Whether a step depends on the figures of the one before, which then have to be read first."""
        options = self.options
        return options.on_spike is not OnSpike.OFF or options.on_nonfinite is OnNonFinite.SKIP

    def limits(self) -> tuple[float, float]:
        """The largest loss and the largest gradient norm the next update may have; infinite where any may."""
        options, recent = self.options, self.state.recent
        if options.on_spike is OnSpike.OFF or len(recent) < options.spike_window:
            return math.inf, math.inf
        limit = options.spike_factor * statistics.median(recent)
        return (limit, math.inf) if options.spike_of is SpikeOf.LOSS else (math.inf, limit)

    def check(self, *, batch: int, train_loss: float, grad_norm: float) -> None:
        """Judge global batch ``batch`` (counted from 0), whose update did not happen if it is refused here.

        Raises:
            SkipStep: it must be left out; already counted.
            NumericalInstability: the run must end; its facts hold the numbers of batch and sequences.
        """
        facts = self._facts(batch, train_loss, grad_norm)
        options = self.options
        if not (math.isfinite(train_loss) and math.isfinite(grad_norm)):
            if options.on_nonfinite is OnNonFinite.SKIP:
                self._skip("it is not finite", facts)
            raise _stop(
                f"train_loss is {train_loss} and grad_norm is {grad_norm}",
                facts,
                expected="finite numbers; the weights of the step before are untouched",
                remedy="see which sequence it is with apr-dist replay RUN_DIR; lower --lr, or use"
                " --parallel.precision f32",
            )
        if options.on_spike is OnSpike.OFF:
            return
        by_loss = options.spike_of is SpikeOf.LOSS
        name, value, limit = "grad_norm", grad_norm, self.limits()[1]
        if by_loss:
            name, value, limit = "train_loss", train_loss, self.limits()[0]
        if value > limit:
            what = f"{name} {value:.4g} is above {limit:.4g}, {options.spike_factor:g} times the median"
            if options.on_spike is OnSpike.SKIP:
                self._skip(what, facts)
            raise _stop(
                what,
                facts,
                expected=f"at most {limit:.4g}; the weights of the step before are untouched",
                remedy="see which sequence it is with apr-dist replay RUN_DIR, or set guards.on_spike",
            )
        self.state.recent = [*self.state.recent, value][-options.spike_window :]

    def _skip(self, why: str, facts: dict[str, Any]) -> None:
        if self.state.skipped >= self.options.max_skipped:
            raise _stop(
                f"{self.state.skipped} steps were skipped and this one would be the next: {why}",
                facts,
                expected=f"at most guards.max_skipped = {self.options.max_skipped} of them",
                remedy="look at those batches with apr-dist replay RUN_DIR --step K, and lower --lr",
            )
        self.state.skipped += 1
        raise SkipStep(why, facts)

    def _facts(self, batch: int, train_loss: float, grad_norm: float) -> dict[str, Any]:
        first = self._origin[1] + (batch - self._origin[0]) * self._batch_size
        return {
            "step": batch + 1,
            "batch": batch,
            "sequences": [first, first + self._batch_size - 1],
            "train_loss": _number(train_loss),
            "grad_norm": _number(grad_norm),
        }


def _stop(what: str, facts: dict[str, Any], *, expected: str, remedy: str) -> NumericalInstability:
    first, last = facts["sequences"]
    error = NumericalInstability(
        what,
        where=f"step {facts['step']}, global batch {facts['batch']}, sequences {first} to {last}",
        expected=expected,
        remedy=remedy,
        falsifier=NON_FINITE,
    )
    error.facts = facts
    return error


def _number(value: float) -> float | str:
    """A figure as JSON has it; what is not finite, as text."""
    return value if math.isfinite(value) else str(value)
