"""What measured losses must be: at step 0, against random weights, between two paths, at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from apr_dist.errors import LossRefused
from apr_dist.gates.result import GateResult

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
    log_v = math.log(vocab_size)
    shown = f"{val_loss:.4f}"
    if not from_init:
        low = log_v - SCRATCH_SLACK
        return [
            GateResult(
                id="FALSIFY-APR-PRETRAIN-INIT-006",
                gate="step-0 loss of random weights",
                measured=shown,
                required=f"at least ln V - {SCRATCH_SLACK} = {low:.2f}",
                passed=math.isfinite(val_loss) and val_loss >= low,
            )
        ]
    return [
        GateResult(
            id="FALSIFY-APR-PRETRAIN-INIT-006",
            gate="step-0 loss of the init",
            measured=shown,
            required=f"at most {INIT_LOSS_CAP}",
            passed=math.isfinite(val_loss) and val_loss <= INIT_LOSS_CAP,
        ),
        GateResult(
            id="FALSIFY-APR-PRETRAIN-INIT-FINETUNE-003",
            gate="step-0 loss against chance",
            measured=shown,
            required=f"at most {INIT_LOSS_SHARE} ln V = {INIT_LOSS_SHARE * log_v:.2f}",
            passed=math.isfinite(val_loss) and val_loss <= INIT_LOSS_SHARE * log_v,
        ),
        *_reopened_gate(val_loss, recorded),
    ]


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
    low = math.log(vocab_size) - SCRATCH_SLACK
    finite = math.isfinite(random_loss) and math.isfinite(init_loss)
    return [
        GateResult(
            id="FALSIFY-APR-PRETRAIN-INIT-006",
            gate="random weights know nothing",
            measured=f"{random_loss:.4f}",
            required=f"at least ln V - {SCRATCH_SLACK} = {low:.2f}",
            passed=finite and random_loss >= low,
        ),
        GateResult(
            id="FALSIFY-APR-PRETRAIN-INIT-FINETUNE-003",
            gate="step-0 loss against random weights",
            measured=f"{init_loss:.4f} against {random_loss:.4f} on the same {tokens:,} tokens",
            required="below random weights",
            passed=finite and init_loss < random_loss,
        ),
    ]


def _reopened_gate(val_loss: float, recorded: float | None) -> list[GateResult]:
    if recorded is None:
        return []
    return [
        GateResult(
            id="FALSIFY-APR-DIST-CHECKPOINT-005",
            gate="checkpoint has the loss it was saved with",
            measured=f"{val_loss:.6f}",
            required=f"{recorded:.6f} within {AGREEMENT:.0e}",
            passed=abs(val_loss - recorded) <= AGREEMENT,
        )
    ]


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
        worst = max(agreements, key=lambda pair: pair.difference)
        steps = " and ".join(str(pair.step) for pair in agreements)
        results.append(
            GateResult(
                id="FALSIFY-APR-PRETRAIN-INIT-FINETUNE-007",
                gate=f"evaluation agrees with training (steps {steps})",
                measured=f"{worst.difference:.1e} apart",
                required=f"at most {AGREEMENT:.0e}",
                passed=worst.difference <= AGREEMENT,
            )
        )
    if train_loss is not None:
        results.append(
            GateResult(
                id="FALSIFY-APR-PRETRAIN-INIT-FINETUNE-007",
                gate="validation loss is plausible",
                measured=f"{val_loss:.4f}",
                required=f"at least {PLAUSIBLE_SHARE} x training loss {train_loss:.4f}",
                passed=val_loss >= PLAUSIBLE_SHARE * train_loss,
            )
        )
    return results


def final_gates(
    *, first_val_loss: float, val_loss: float, target: float, finetune: bool, steps: int
) -> list[GateResult]:
    """What the last validation loss must be, and what it should be."""
    results = []
    if finetune:
        results.append(
            GateResult(
                id="FALSIFY-APR-PRETRAIN-INIT-FINETUNE-005",
                gate="final validation loss",
                measured=f"{val_loss:.4f}",
                required=f"finite and below {FINAL_LOSS_CAP}",
                passed=math.isfinite(val_loss) and val_loss < FINAL_LOSS_CAP,
            )
        )
    if steps:
        results.append(
            GateResult(
                id="FALSIFY-APR-DIST-TRAINER-010",
                gate="validation loss fell",
                measured=f"{val_loss - first_val_loss:+.4f}",
                required=f"below step 0 ({first_val_loss:.4f})",
                passed=val_loss < first_val_loss,
                ship_blocking=False,
            )
        )
    results.append(
        GateResult(
            id="INV-TRAIN-004",
            gate="target validation loss",
            measured=f"{val_loss:.4f}",
            required=f"at most {target}",
            passed=val_loss <= target,
            ship_blocking=False,
        )
    )
    return results
