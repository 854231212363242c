"""The guards of a running training: pure checks that stop it before it does harm.

INV-TRAIN-005 (divergence) and the early stop of INV-TRAIN-004; what is judged at every step is in
``step_guard``. None has a warning mode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from apr_dist.errors import DataError, Divergence

FINETUNE_FIRST_LOSS_CAP = 10.0
"""Largest first validation loss of a fine-tuning run, in nats per token."""

MAX_GROWTH = 2.0
"""Largest ratio of a validation loss to the one before it."""


def check_targets(*, step: int, targets: int) -> None:
    """Stop when a global batch had no target that counts: there was nothing to learn from.

    Raises:
        DataError: naming the step.
    """
    if targets:
        return
    raise DataError(
        f"step {step} has no target that counts: each is one of loader.ignored_ids, or flagged as none",
        where="training shards",
        expected="at least one target that counts in each global batch",
        remedy="name fewer ids, raise --batch-size, or encode conversations with another --train-on",
    )


def check_validation(
    *, val_loss: float, previous: float | None, vocab_size: int, from_scratch: bool, evaluation: int
) -> None:
    """The non-divergence rule: a cap on the first validation loss, a bound on its growth after.

    Raises:
        Divergence: naming the loss, the one before and the bound.
    """
    cap = 2.0 * math.log(vocab_size) if from_scratch else FINETUNE_FIRST_LOSS_CAP
    bound = cap if previous is None else MAX_GROWTH * previous
    if math.isfinite(val_loss) and val_loss <= bound:
        return
    before = "the first one" if previous is None else f"{previous:.4f} before"
    raise Divergence(
        f"validation loss is {val_loss:.4f} ({before})",
        where=f"evaluation {evaluation}",
        expected=f"a finite value of at most {bound:.4f}",
        remedy="lower --lr or lengthen --warmup-steps, and start from the last good checkpoint",
        falsifier="INV-TRAIN-005",
    )


@dataclass(frozen=True)
class EarlyStop:
    """Patience over evaluations: how many in a row brought no improvement."""

    patience: int
    min_evaluations: int
    best: float = math.inf
    without_improvement: int = 0

    def after(self, val_loss: float) -> EarlyStop:
        """The state after one more evaluation."""
        improved = val_loss < self.best
        return EarlyStop(
            patience=self.patience,
            min_evaluations=self.min_evaluations,
            best=min(self.best, val_loss),
            without_improvement=0 if improved else self.without_improvement + 1,
        )

    def stops(self, evaluations_done: int) -> bool:
        """Whether to end now: patience used up, and never before ``min_evaluations``."""
        return self.without_improvement > self.patience and evaluations_done >= self.min_evaluations
