"""Gate: rounding may not swallow the training. Asked at every evaluation."""

from __future__ import annotations

from apr_dist.choices import WeightStorage
from apr_dist.errors import WeightsRefused
from apr_dist.gates.result import GateResult

MOST_LOST = 0.1
"""Largest share of updates below half a unit in the last place, where weights are rounded to the nearest."""

UPDATES = "FALSIFY-APR-DIST-TRAINER-041"


def updates_gate(below_half_ulp: float, weights: WeightStorage) -> GateResult:
    """Whether few enough updates are too small for the stored weight.

    Rounding at random keeps small updates on average, so their share is reported there and not judged.
    """
    judged = weights is not WeightStorage.BF16
    return GateResult(
        id=UPDATES,
        gate="updates below half a unit in the last place",
        measured=f"{below_half_ulp:.2%} of those of the last step before the evaluation",
        required=f"at most {MOST_LOST:.0%}" if judged else "reported: weights are rounded at random",
        passed=not judged or below_half_ulp <= MOST_LOST,
        ship_blocking=weights is WeightStorage.BF16_NEAREST,
    )


def refuse_lost_updates(below_half_ulp: float, weights: WeightStorage, *, step: int) -> None:
    """Stop a run whose weights, rounded to the nearest bf16, stay what they are.

    Raises:
        WeightsRefused: naming the share, the bound and what loses nothing.
    """
    gate = updates_gate(below_half_ulp, weights)
    if gate.passed or not gate.ship_blocking:
        return
    raise WeightsRefused(
        f"{below_half_ulp:.1%} of the updates are smaller than half a unit in the last place of a bf16"
        " weight, and rounding to the nearest drops them",
        where=f"step {step}, --memory.weights {weights}",
        expected=f"at most {MOST_LOST:.0%}",
        remedy="use --memory.weights split, which is exact, or bf16, which rounds at random",
        falsifier=UPDATES,
    )
