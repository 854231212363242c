"""What measured losses must be: at step 0, against random weights, between two paths, at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from apr_dist.errors import LossRefused
from apr_dist.gates.result import GateResult

_START, _CHANCE = "FALSIFY-APR-PRETRAIN-INIT-006", "FALSIFY-APR-PRETRAIN-INIT-FINETUNE-003"
_FINAL, _AGREES = "FALSIFY-APR-PRETRAIN-INIT-FINETUNE-005", "FALSIFY-APR-PRETRAIN-INIT-FINETUNE-007"
_FELL, _TARGET = "FALSIFY-APR-DIST-TRAINER-010", "INV-TRAIN-004"

INIT_LOSS_CAP = 6.0
"""FALSIFY-APR-PRETRAIN-INIT-006: largest step-0 validation loss of a pretrained init, nats."""

INIT_LOSS_SHARE = 0.7
"""FALSIFY-APR-PRETRAIN-INIT-FINETUNE-003: the same, as a share of ln V."""

SCRATCH_SLACK = 1.5
"""FALSIFY-APR-PRETRAIN-INIT-006: how far below ln V random weights may be, nats."""

FINAL_LOSS_CAP = 9.38
"""FALSIFY-APR-PRETRAIN-INIT-FINETUNE-005: largest final validation loss, nats."""

AGREEMENT = 1e-4
"""FALSIFY-APR-PRETRAIN-INIT-FINETUNE-007: training and evaluation path on the same sequences."""

PLAUSIBLE_SHARE = 0.5
"""FINETUNE-007: a validation loss below this share of the training loss is an artefact."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The loss of the same sequences at the same weights, through training and evaluation."""

    step: int
    train_loss: float
    eval_loss: float

    @property
    def difference(self) -> float:
        """Absolute difference in nats per token."""
        return abs(self.train_loss - self.eval_loss)


def step_zero_gates(
    val_loss: float, *, vocab_size: int, from_init: bool, recorded: float | None = None
) -> list[GateResult]:
    """What the first validation loss must be, for a pretrained init or for random weights.

    Args:
        val_loss: the measured one, in nats per token.
        vocab_size: rows of the embedding; chance is ln V.
        from_init: whether the weights came from a file.
        recorded: what that file says the same evaluation gave when it was saved.
    """
    log_v, shown, finite = math.log(vocab_size), f"{val_loss:.4f}", math.isfinite(val_loss)
    if not from_init:
        low = log_v - SCRATCH_SLACK
        least = f"at least ln V - {SCRATCH_SLACK} = {low:.2f}"
        passed = finite and val_loss >= low
        return [GateResult(_START, "step-0 loss of random weights", shown, least, passed)]
    cap, limit = f"at most {INIT_LOSS_CAP}", INIT_LOSS_SHARE * log_v
    share = f"at most {INIT_LOSS_SHARE} ln V = {limit:.2f}"
    gates = [
        GateResult(_START, "step-0 loss of the init", shown, cap, finite and val_loss <= INIT_LOSS_CAP),
        GateResult(_CHANCE, "step-0 loss against chance", shown, share, finite and val_loss <= limit),
    ]
    return gates if recorded is None else [*gates, _reopened(val_loss, recorded)]


def random_start_gates(
    *, random_loss: float, init_loss: float, tokens: int, vocab_size: int
) -> list[GateResult]:
    """What an init must show against random weights on the same held-out sequences.

    Args:
        random_loss: of freshly drawn weights, in nats per token.
        init_loss: of the file's weights on the same sequences.
        tokens: how many tokens those are.
        vocab_size: rows of the embedding.
    """
    measured = f"{init_loss:.4f} against {random_loss:.4f} on the same {tokens:,} tokens"
    finite = math.isfinite(random_loss) and math.isfinite(init_loss)
    better = finite and init_loss < random_loss
    low, shown = math.log(vocab_size) - SCRATCH_SLACK, f"{random_loss:.4f}"
    least = f"at least ln V - {SCRATCH_SLACK} = {low:.2f}"
    return [
        GateResult(_START, "random weights know nothing", shown, least, finite and random_loss >= low),
        GateResult(_CHANCE, "step-0 loss against random weights", measured, "below random weights", better),
    ]


def _reopened(val_loss: float, recorded: float) -> GateResult:
    return GateResult(
        "FALSIFY-APR-DIST-CHECKPOINT-005",
        "checkpoint has the loss it was saved with",
        f"{val_loss:.6f}",
        f"{recorded:.6f} within {AGREEMENT:.0e}",
        abs(val_loss - recorded) <= AGREEMENT,
    )


def refuse_failed(results: Sequence[GateResult], *, where: str) -> None:
    """Stop at the first ship-blocking gate that failed.

    Raises:
        LossRefused: naming what was measured and required.
    """
    for result in results:
        if result.ship_blocking and not result.passed:
            raise LossRefused(
                f"{result.gate} is {result.measured}",
                where=where,
                expected=result.required,
                remedy="check that the tokenizer and data are this model's, and import the model again",
                falsifier=result.id,
            )


def evaluation_gates(
    agreements: Sequence[Agreement], *, val_loss: float, train_loss: float | None
) -> list[GateResult]:
    """FINETUNE-007: evaluation reads the live weights, and its figure is one a model can reach."""
    results = []
    if agreements:
        worst = max(pair.difference for pair in agreements)
        gate = (
            f"evaluation agrees with training (steps {' and '.join(str(pair.step) for pair in agreements)})"
        )
        limit = f"at most {AGREEMENT:.0e}"
        results.append(GateResult(_AGREES, gate, f"{worst:.1e} apart", limit, worst <= AGREEMENT))
    if train_loss is not None:
        floor = f"at least {PLAUSIBLE_SHARE} x training loss {train_loss:.4f}"
        passed = val_loss >= PLAUSIBLE_SHARE * train_loss
        results.append(GateResult(_AGREES, "validation loss is plausible", f"{val_loss:.4f}", floor, passed))
    return results


def final_gates(
    *, first_val_loss: float, val_loss: float, target: float, finetune: bool, steps: int
) -> list[GateResult]:
    """What the last validation loss must be, and what it should be."""
    results, shown = [], f"{val_loss:.4f}"
    if finetune:
        required = f"finite and below {FINAL_LOSS_CAP}"
        passed = math.isfinite(val_loss) and val_loss < FINAL_LOSS_CAP
        results.append(GateResult(_FINAL, "final validation loss", shown, required, passed))
    if steps:
        change, below = f"{val_loss - first_val_loss:+.4f}", f"below step 0 ({first_val_loss:.4f})"
        results.append(_advisory(_FELL, "validation loss fell", change, below, val_loss < first_val_loss))
    limit = f"at most {target}"
    return [*results, _advisory(_TARGET, "target validation loss", shown, limit, val_loss <= target)]


_advisory = partial(GateResult, ship_blocking=False)
