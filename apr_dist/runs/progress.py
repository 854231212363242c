"""Where a run is: the only state of the loop besides model and optimizer, and what it starts from."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from apr_dist.apr.metadata import AprMetadata
from apr_dist.gates.losses import Agreement
from apr_dist.gates.result import GateResult
from apr_dist.model.adapters import Adapter
from apr_dist.model.config import TransformerConfig
from apr_dist.model.routing import RoutingFigures
from apr_dist.runs.saved_state import SavedState


@dataclass(frozen=True)
class Evaluation:
    """A measured loss.

    Attributes:
        loss: mean negative log-likelihood in nats per token, over every token of the sample.
        tokens: how many target tokens that was, over all ranks.
        wall_s: seconds it took.
        routing: what the routers of a mixture did with these tokens; None for a dense model.
    """

    loss: float
    tokens: int
    wall_s: float
    routing: RoutingFigures | None = None

    @property
    def is_finite(self) -> bool:
        """Whether the loss is a number."""
        return math.isfinite(self.loss)

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite when that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True, kw_only=True)
class RandomStart:
    """Two losses of the same held-out sequences in nats per token.

    Attributes:
        random_loss: of freshly drawn weights.
        init_loss: of the file's weights.
        tokens: target tokens that both were measured on.
    """

    random_loss: float
    init_loss: float
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        return asdict(self)


@dataclass
class GuardState:
    """What a guard remembers; part of every step folder.

    Attributes:
        skipped: steps of this run whose update was left out.
        recent: what the newest updates were judged by, oldest first.
    """

    skipped: int = 0
    recent: list[float] = field(default_factory=list)


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
        run: identity of the run, under which steps are saved; empty if nothing is.
        adapter: what is trained in place of the weights; None: the weights.
    """

    model_config: TransformerConfig
    from_init: bool
    metadata: AprMetadata | None
    provenance: dict[str, Any]
    recorded_val_loss: float | None = None
    random_start: RandomStart | None = None
    run: str = ""
    adapter: Adapter | None = None


@dataclass
class Progress:
    """Where a run is; changed by the trainer alone.

    ``updates_lost`` are the shares that were measured at the newest step before an evaluation.
    """

    step: int = 0
    tokens_seen: int = 0
    train_loss: float | None = None
    grad_norm_max: float = 0.0
    evaluated_at: int = -1
    evaluations: list[Evaluation] = field(default_factory=list)
    updates_lost: dict[str, float] | None = None
    agreements: list[Agreement] = field(default_factory=list)
    first_gates: list[GateResult] = field(default_factory=list)
    guard: GuardState = field(default_factory=GuardState)
    data_epochs: dict[str, int] = field(default_factory=dict)
    data_origin: tuple[int, int] = (0, 0)

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
                Evaluation(loss=loss, tokens=int(tokens), wall_s=0.0)
                for loss, tokens, *_ in state.evaluations
            ],
            agreements=[
                Agreement(step=int(step), train_loss=train, eval_loss=evaluated)
                for step, train, evaluated in state.agreements
            ],
            first_gates=[GateResult(**gate) for gate in state.first_gates],
            guard=GuardState(**state.guard),
            data_origin=(state.data_origin[0], state.data_origin[1]),
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
