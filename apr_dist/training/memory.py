"""How much memory a process of a run takes, from dimensions alone; nothing is built or loaded.

Every figure counts what ``model`` and the loop really keep: the tensors each layer saves for backward,
one chunk of logits, AdamW's two moments, the gradients; and on the CPU what the process holds beyond them.
The interpreter, its libraries and a GPU's context come on top and are not in any figure here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from apr_dist.config_sections import ActivationCheckpointing, Precision, StrategyChoice
from apr_dist.model.config import TransformerConfig
from apr_dist.model.flops import LOGITS_CHUNK_BYTES

F32 = 4
"""Bytes of weights, gradients and optimizer moments, whatever the compute type is."""

UNFIT_SHARE = 0.7
"""Of freed activations and gradients, what later blocks do not fit into: measured, see `_unfit_bytes`."""


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
        unfit: freed blocks that the C library keeps and that no later block fits into; CPU only.
        copies: of weights and moments, from which a save is written while training goes on; CPU only.
        moment: which moment that is.
    """

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    activations: int
    loss: int
    working: int
    unfit: int
    copies: int
    moment: str

    @property
    def tensors(self) -> int:
        """What tensors take, without what else the process holds."""
        return self.total - self.unfit - self.copies

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
        checkpointing: what a block keeps of itself.
        copies: whether a save is written from copies of the state.
        trains_meanwhile: whether training goes on after a save; if not, the only save is at the end.
    """

    micro_batch: int
    seq_length: int
    accumulates: bool
    precision: Precision
    cuda: bool
    checkpointing: ActivationCheckpointing = ActivationCheckpointing.OFF
    copies: bool = False
    trains_meanwhile: bool = False

    @property
    def tokens(self) -> int:
        """Tokens per forward."""
        return self.micro_batch * self.seq_length

    @property
    def compute_bytes(self) -> int:
        """Bytes of one element of the compute type."""
        return 2 if self.precision is Precision.BF16 else F32


def estimate(
    model: TransformerConfig, load: Load, *, strategy: StrategyChoice, world_size: int, shard_size: int
) -> Memory:
    """Memory of one process at its fullest moment.

    Four moments can be the fullest: the loss (all activations, the logits), the first layer of backward
    (all activations, that layer's gradients), the end of backward (all gradients), and a save (copies).

    Args:
        model: the decoder.
        load: what one process computes at once.
        strategy: how the model is spread; ``auto`` is single or DDP, as the world size says.
        world_size: processes in all.
        shard_size: processes that share one copy under ``hsdp``.
    """
    count = model.parameter_count()
    parts = _shards(strategy, world_size, shard_size)
    gradients = F32 * count // parts.gradients
    state = {
        "weights": F32 * count // parts.weights + _gathered(model, load, strategy),
        "optimizer": 2 * F32 * count // parts.optimizer,
        "buckets": F32 * count if _is_ddp(strategy, world_size) else 0,
    }
    kept = gradients if load.accumulates else 0
    activations = model.num_layers * kept_bytes(model, load) + _end_bytes(model, load)
    state["unfit"] = 0 if load.cuda else _unfit_bytes(gradients=gradients, activations=activations)
    head = model.vocab_size * model.hidden_size * F32
    at_loss = {"gradients": kept, "loss": _logits_bytes(model, load) + head, "working": 0}
    # What a block did not keep it has again when its backward begins.
    again = layer_bytes(model, load) - kept_bytes(model, load)
    at_start = {"gradients": kept, "loss": head, "working": _backward_bytes(model, load) + again}
    # A tied embedding gets two gradients, the head's and the lookup's, and their sum beside both.
    at_end = {"gradients": gradients, "loss": 0, "working": 2 * head if model.tie_word_embeddings else 0}
    copies = (
        F32 * (count // parts.weights + 2 * count // parts.optimizer) if load.copies and not load.cuda else 0
    )
    beside = copies if load.trains_meanwhile else 0
    nothing = {"gradients": 0, "loss": 0, "working": 0}
    moments = [
        Memory(**state, **at_loss, activations=activations, copies=beside, moment="loss"),
        Memory(**state, **at_start, activations=activations, copies=beside, moment="start of backward"),
        Memory(**state, **at_end, activations=0, copies=beside, moment="end of backward"),
        Memory(**state, **nothing, activations=0, copies=copies, moment="save"),
    ]
    return max(moments, key=lambda moment: moment.total)


@dataclass(frozen=True)
class _Shards:
    """Into how many parts each kind of state is cut."""

    weights: int
    gradients: int
    optimizer: int


def _shards(strategy: StrategyChoice, world: int, shard_size: int) -> _Shards:
    if strategy in {StrategyChoice.FSDP2, StrategyChoice.SHARD_GRAD_OP, StrategyChoice.ZERO3}:
        return _Shards(world, world, world)
    if strategy is StrategyChoice.HSDP:
        return _Shards(shard_size, shard_size, shard_size)
    if strategy is StrategyChoice.ZERO2:
        return _Shards(1, world, world)
    return _Shards(1, 1, world if strategy is StrategyChoice.ZERO1 else 1)


def _is_ddp(strategy: StrategyChoice, world: int) -> bool:
    return strategy is StrategyChoice.DDP or (strategy is StrategyChoice.AUTO and world > 1)


def _gathered(model: TransformerConfig, load: Load, strategy: StrategyChoice) -> int:
    """Whole weights held beside a process's own: gathered ones, and autocast's copies on a GPU."""
    count, width = model.parameter_count(), load.compute_bytes
    if strategy is StrategyChoice.SHARD_GRAD_OP:
        return width * count
    if strategy in {StrategyChoice.FSDP2, StrategyChoice.HSDP, StrategyChoice.ZERO3}:
        ends = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
        # This block and the next, which is fetched meanwhile, beside embedding and head.
        return width * (ends + 2 * (count - ends) // model.num_layers)
    return width * count if load.cuda and load.precision is Precision.BF16 else 0


def kept_bytes(model: TransformerConfig, load: Load) -> int:
    """Bytes one block keeps from its forward to its backward, checkpointed as the load says."""
    if load.checkpointing is ActivationCheckpointing.OFF:
        return layer_bytes(model, load)
    per_token = F32 * model.hidden_size
    if load.checkpointing is ActivationCheckpointing.SELECTIVE:
        # Of the products q, k, v, o, gate, up, down every second from the first; and attention's result.
        products = model.query_size + model.kv_size + model.intermediate_size + model.hidden_size
        per_token += load.compute_bytes * (products + model.query_size) + F32 * model.num_heads
    return load.tokens * per_token


def layer_bytes(model: TransformerConfig, load: Load) -> int:
    """Bytes one block needs for backward."""
    hidden, inner = model.hidden_size, model.intermediate_size
    attention = 2 * model.query_size + 2 * model.kv_size
    normed = model.query_size + model.kv_size if model.qk_norm else 0
    # Two residual inputs in f32; then what linear maps, attention and the MLP keep.
    width = load.compute_bytes
    # On the CPU a norm's output is computed again; on a GPU autocast casts it for each map that reads it.
    linear_inputs = (2 if load.precision is Precision.F32 else 5) * hidden if load.cuda else 0
    gates = 4 * inner if load.cuda else 2 * inner
    per_token = (
        F32 * 2 * hidden + width * (linear_inputs + attention + normed + gates) + F32 * model.num_heads
    )
    return load.tokens * per_token


def _end_bytes(model: TransformerConfig, load: Load) -> int:
    """Final norm's input, the head's input, and its gradient."""
    return load.tokens * model.hidden_size * (F32 + 2 * load.compute_bytes)


def _logits_bytes(model: TransformerConfig, load: Load) -> int:
    chunk = min(load.tokens, max(1, LOGITS_CHUNK_BYTES // (load.compute_bytes * model.vocab_size)))
    if load.cuda:
        widened = F32 if load.precision is Precision.BF16 else 0
        # The chunk before is still there while the next, perhaps shorter, is computed.
        return min(load.tokens, 2 * chunk) * model.vocab_size * (load.compute_bytes + widened)
    # The head's gradient is a product with the transposed chunk, which the CPU library copies.
    return 2 * chunk * model.vocab_size * load.compute_bytes


def _backward_bytes(model: TransformerConfig, load: Load) -> int:
    """The gradients of gate, up, their product and the recomputed product, with the residual's."""
    return load.tokens * (4 * model.intermediate_size * load.compute_bytes + 2 * F32 * model.hidden_size)


def _unfit_bytes(*, gradients: int, activations: int) -> int:
    """Holes of the heap: gradients and activations take turns in the same memory, in blocks of other sizes.

    Freed memory is kept (``model.host_memory``), so the process stays as large as its blocks ever reached.
    How much of the smaller of the two finds no place in the other's was measured on five shapes of 27 and 34
    million parameters: 0.4 to 1.0 of it. ``tests/test_people_plan.py`` compares the whole with real runs.
    """
    return int(UNFIT_SHARE * min(gradients, activations))


PARTS: Mapping[str, str] = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "buckets": "DDP buckets",
    "activations": "activations",
    "loss": "logits, head",
    "working": "in passing",
    "unfit": "unfit",
    "copies": "save copies",
}
"""Attribute of ``Memory`` to what a table calls it, in order."""
