"""How much memory a process of a run takes, from dimensions alone; nothing is built or loaded.

Every figure counts what ``model`` and the loop really keep: the tensors each layer saves for backward,
one chunk of logits, AdamW's two moments, the gradients. The interpreter, its libraries and a GPU's
context come on top and are not in any figure here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from apr_dist.config import Precision, StrategyChoice
from apr_dist.model.config import TransformerConfig

LOGITS_CHUNK_BYTES = 128 << 20
"""Largest chunk of f32 logits the loss holds at once (``apr_dist.model.loss.CHUNK_BYTES``)."""

F32 = 4
"""Bytes of weights, gradients and optimizer moments, whatever the compute type is."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process at its fullest moment, by part.

    Attributes:
        weights: parameters in f32, and their copies in the compute type where it is another.
        gradients: of every parameter that has one at that moment.
        optimizer: AdamW's two moments.
        buckets: DDP's own copy of the gradients, which it sends.
        activations: what forward keeps for backward.
        loss: the logits chunk and the head's gradient.
        working: what a backward step computes on the way.
        moment: which moment that is.
    """

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    activations: int
    loss: int
    working: int
    moment: str

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "moment")


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one process computes at once.

    Attributes:
        micro_batch: sequences per forward.
        seq_length: tokens per sequence.
        accumulates: whether gradients of an earlier micro-batch are there during a later forward.
        precision: compute type.
        cuda: whether it computes on a GPU, where backward is autograd's and keeps more.
    """

    micro_batch: int
    seq_length: int
    accumulates: bool
    precision: Precision
    cuda: bool

    @property
    def tokens(self) -> int:
        """Tokens per forward."""
        return self.micro_batch * self.seq_length

    @property
    def compute_bytes(self) -> int:
        """Bytes of one element of the compute type."""
        return 2 if self.precision is Precision.BF16 else F32


def estimate(model: TransformerConfig, load: Load, *, strategy: StrategyChoice, world_size: int) -> Memory:
    """Memory of the fullest process at its fullest moment.

    Three moments can be the fullest: the loss (all activations, the logits), the first layer of
    backward (all activations, that layer's gradients), and the end of backward (all gradients).
    """
    count = model.parameter_count()
    ddp = strategy is StrategyChoice.DDP or (strategy is StrategyChoice.AUTO and world_size > 1)
    state = {
        "weights": F32 * count + _compute_copies(model, load),
        "optimizer": 2 * F32 * count,
        "buckets": F32 * count if ddp else 0,
    }
    kept = F32 * count if load.accumulates else 0
    activations = model.num_layers * layer_bytes(model, load) + _end_bytes(model, load)
    head = model.vocab_size * model.hidden_size * F32
    moments = [
        Memory(
            **state,
            gradients=kept,
            activations=activations,
            loss=_logits_bytes(model, load) + head,
            working=0,
            moment="loss",
        ),
        Memory(
            **state,
            gradients=kept + _mlp_bytes(model),
            activations=activations,
            loss=head,
            working=_backward_bytes(model, load),
            moment="start of backward",
        ),
        Memory(
            **state,
            gradients=F32 * count,
            activations=0,
            loss=0,
            # A tied embedding gets two gradients: the head's waits while the lookup's is made.
            working=head if model.tie_word_embeddings or load.accumulates else 0,
            moment="end of backward",
        ),
    ]
    return max(moments, key=lambda moment: moment.total)


def layer_bytes(model: TransformerConfig, load: Load) -> int:
    """Bytes one block keeps for backward."""
    hidden, inner = model.hidden_size, model.intermediate_size
    attention = 2 * model.query_size + 2 * model.kv_size
    normed = model.query_size + model.kv_size if model.qk_norm else 0
    # Two residual inputs in f32; then what linear maps, attention and the MLP keep.
    width = load.compute_bytes
    if load.precision is Precision.F32:
        linear_inputs = 2 * hidden
        gates = 4 * inner if load.cuda else 2 * inner
    else:
        # Autocast casts the normed input once for each linear map that reads it.
        linear_inputs = 5 * hidden if load.cuda else 4 * hidden
        gates = 4 * inner if load.cuda else 2 * inner
    per_token = (
        F32 * 2 * hidden + width * (linear_inputs + attention + normed + gates) + F32 * model.num_heads
    )
    return load.tokens * per_token


def _end_bytes(model: TransformerConfig, load: Load) -> int:
    """Final norm's input, the head's input, and its gradient."""
    return load.tokens * model.hidden_size * (F32 + 2 * load.compute_bytes)


def _logits_bytes(model: TransformerConfig, load: Load) -> int:
    chunk = min(load.tokens, max(1, LOGITS_CHUNK_BYTES // (F32 * model.vocab_size)))
    # The chunk before is still there while the next, perhaps shorter, is computed.
    live = min(load.tokens, 2 * chunk)
    width = F32 if load.precision is Precision.F32 else F32 + load.compute_bytes
    return live * model.vocab_size * width


def _backward_bytes(model: TransformerConfig, load: Load) -> int:
    """The gradients of gate, up, their product and the recomputed product, with the residual's."""
    return load.tokens * (4 * model.intermediate_size * load.compute_bytes + 2 * F32 * model.hidden_size)


def _mlp_bytes(model: TransformerConfig) -> int:
    return F32 * 3 * model.hidden_size * model.intermediate_size


def _compute_copies(model: TransformerConfig, load: Load) -> int:
    """Autocast keeps a copy of every matrix it multiplied by until backward is done."""
    return 0 if load.precision is Precision.F32 else load.compute_bytes * model.parameter_count()


PARTS: Mapping[str, str] = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "buckets": "DDP buckets",
    "activations": "activations",
    "loss": "logits, head gradient",
    "working": "backward, at once",
}
"""Attribute of ``Memory`` to what a table calls it, in order."""
