"""Where a run is: the only state of the loop besides model and optimizer, and what it starts from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from apr_dist.apr.metadata import AprMetadata
from apr_dist.gates.result import GateResult
from apr_dist.model.config import TransformerConfig
from apr_dist.training.evaluation import Evaluation
from apr_dist.training.random_start import RandomStart
from apr_dist.training.step_folders import SavedState
from apr_dist.training.step_guard import GuardState
from apr_dist.training.verdict import Agreement


@dataclass(frozen=True)
class Start:
    """What a run starts from, as rank 0 proved it.

    Attributes:
        model_config: architecture of the decoder.
        from_init: whether its weights came from a file.
        metadata: metadata of that file (None from scratch and on other ranks).
        provenance: facts for the checkpoint's metadata.
        recorded_val_loss: what the file says the same evaluation gave when it was saved, if it does.
        random_start: how it compares with random weights, where that was measured.
    """

    model_config: TransformerConfig
    from_init: bool
    metadata: AprMetadata | None
    provenance: dict[str, Any]
    recorded_val_loss: float | None = None
    random_start: RandomStart | None = None


@dataclass
class Progress:
    """Where a run is; changed by the trainer alone."""

    step: int = 0
    tokens_seen: int = 0
    train_loss: float | None = None
    grad_norm_max: float = 0.0
    evaluated_at: int = -1
    evaluations: list[Evaluation] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)
    first_gates: list[GateResult] = field(default_factory=list)
    guard: GuardState = field(default_factory=GuardState)
    data_epochs: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_saved(cls, state: SavedState) -> Progress:
        """Where the run stood when ``state`` was saved."""
        return cls(
            step=state.step,
            tokens_seen=state.tokens_seen,
            train_loss=state.train_loss,
            grad_norm_max=state.grad_norm_max,
            evaluated_at=state.step if state.evaluated_at is None else state.evaluated_at,
            evaluations=[
                Evaluation(loss=loss, tokens=int(tokens), wall_s=wall_s)
                for loss, tokens, wall_s in state.evaluations
            ],
            agreements=[
                Agreement(step=int(step), train_loss=train, eval_loss=evaluated)
                for step, train, evaluated in state.agreements
            ],
            first_gates=[GateResult(**gate) for gate in state.first_gates],
            guard=GuardState(**state.guard),
        )

    @property
    def evaluation(self) -> int:
        """Number of the newest evaluation; the one before the first step is 0."""
        return max(0, len(self.evaluations) - 1)

    @property
    def val_loss(self) -> float:
        """The newest validation loss."""
        return self.evaluations[-1].loss

    @property
    def val_loss_now(self) -> float | None:
        """The validation loss of these very weights, or None when they were not evaluated."""
        return self.val_loss if self.evaluated_at == self.step else None
