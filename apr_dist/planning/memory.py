"""How much memory a process of a run takes, from dimensions alone; nothing is built or loaded.

Every figure counts what ``model`` and the loop really keep: the tensors each layer saves for backward,
one chunk of logits, AdamW's two moments, the gradients; and on the CPU what the process holds beyond them.
The interpreter, its libraries and a GPU's context come on top and are not in any figure here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from apr_dist.choices import ActivationCheckpointing, Offload, Precision, Strategy
from apr_dist.model.config import TransformerConfig
from apr_dist.model.families import Norms
from apr_dist.model.flops import HEAD_GRADIENT_ROWS, logits_chunk
from apr_dist.parallel.state_bits import BLOCK, can_have, is_eligible
from apr_dist.parallel.strategy import possible_offloads

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
        masters: the f32 weights that DeepSpeed updates, beside those that compute.
        buckets: from which DDP sends gradients, and where they are once sent; the largest one, where ZeRO
            offloads.
        activations: what forward keeps for backward.
        loss: the logits chunk and the head's gradient.
        working: what a backward step computes on the way.
        unfit: freed blocks that the C library keeps and that no later block fits into; CPU only.
        copies: of weights and moments, from which a save is written while training goes on; CPU only.
        offloaded: what would be in host memory beside a GPU; CPU only, where that is the same memory.
        moment: which moment that is.
        offload: what was kept in host memory.
        host: what a process on a GPU holds in host memory: what is offloaded, and the copies of a save.
    """

    weights: int
    gradients: int
    optimizer: int
    masters: int
    buckets: int
    activations: int
    loss: int
    working: int
    unfit: int
    copies: int
    offloaded: int
    moment: str
    offload: Offload
    host: int

    @property
    def tensors(self) -> int:
        """What tensors take, without what else the process holds."""
        return self.total - self.unfit - self.copies

    @property
    def total(self) -> int:
        """All parts together."""
        apart = {"moment", "offload", "host"}
        return sum(getattr(self, field.name) for field in fields(self) if field.name not in apart)


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
    model: TransformerConfig,
    load: Load,
    *,
    strategy: Strategy,
    world_size: int,
    shard_size: int,
    offload: Offload = Offload.NONE,
    state_bits: int = 32,
) -> Memory:
    """Memory of one process at its fullest moment.

    Four moments can be the fullest: the loss (all activations, the logits), the first layer of backward
    (all activations, that layer's gradients), the end of backward (all gradients), and a save (copies).

    Args:
        model: the decoder.
        load: what one process computes at once.
        strategy: how the model is spread.
        world_size: processes in all.
        shard_size: processes that share one copy under ``hsdp``.
        offload: what lies in host memory; of what the strategy cannot keep there, as much as it can.
        state_bits: of both moments, 8 or 32; 32 where the strategy has no 8.
    """
    parts = shards(strategy, world_size, shard_size)
    offload = most_possible(strategy, offload)
    held = State.of(model, parts, strategy, offload, state_bits)
    state: dict[str, Any] = {
        "weights": held.weights + _gathered(model, load, strategy),
        "optimizer": held.optimizer,
        "masters": held.masters,
        "buckets": held.buckets,
        "offloaded": 0 if load.cuda else held.host,
    }
    kept = held.gradients if load.accumulates or strategy is Strategy.ZERO3 else 0
    activations = model.num_layers * kept_bytes(model, load) + _end_bytes(model, load)
    state["unfit"] = 0 if load.cuda else _unfit_bytes(gradients=held.gradients, activations=activations)
    head = model.vocab_size * model.hidden_size * F32
    at_loss: dict[str, Any] = {"gradients": kept, "loss": _logits_bytes(model, load) + head, "working": 0}
    # What a block did not keep it has again when its backward begins.
    again = layer_bytes(model, load) - kept_bytes(model, load)
    at_start: dict[str, Any] = {
        "gradients": kept,
        "loss": head,
        "working": _backward_bytes(model, load) + again,
    }
    # DDP's gradients are views of its buckets, except those of micro-batches that are not sent.
    are_buckets = strategy is Strategy.DDP and not load.accumulates
    at_end: dict[str, Any] = {
        "gradients": 0 if are_buckets else held.gradients,
        "loss": 0,
        "working": _embedding_gradient_bytes(model, load, is_cut=parts.gradients > 1),
    }
    count = F32 * model.parameter_count()
    moments = _moment_bytes(model, strategy, offload, state_bits)
    copies = count // parts.weights + moments // parts.optimizer if load.copies else 0
    here = 0 if load.cuda else copies
    beside = here if load.trains_meanwhile else 0
    nothing: dict[str, Any] = {"gradients": 0, "loss": 0, "working": 0}
    apart: dict[str, Any] = {"offload": offload, "host": held.host + copies if load.cuda else 0}
    fullest = [
        Memory(**state, **at_loss, activations=activations, copies=beside, moment="loss", **apart),
        Memory(
            **state, **at_start, activations=activations, copies=beside, moment="start of backward", **apart
        ),
        Memory(**state, **at_end, activations=0, copies=beside, moment="end of backward", **apart),
        Memory(**state, **nothing, activations=0, copies=here, moment="save", **apart),
    ]
    return max(fullest, key=lambda moment: moment.total)


def most_possible(strategy: Strategy, offload: Offload) -> Offload:
    """Of what is to lie in host memory as much as the strategy can keep there."""
    order = list(Offload)
    can = possible_offloads(strategy)
    return max((one for one in can if order.index(one) <= order.index(offload)), key=order.index)


@dataclass(frozen=True, kw_only=True)
class State:
    """Bytes of what is trained: where the process computes, and in host memory where it is offloaded.

    ``tests/test_parallel_state.py`` compares it with what real ranks hold under each strategy and offload.

    Attributes:
        weights: of this process, without what is gathered.
        gradients: at the end of backward.
        optimizer: both moments.
        masters: the f32 weights that DeepSpeed updates.
        buckets: through which gradients leave.
        host: everything that is offloaded, with the buffers it travels through.
    """

    weights: int
    gradients: int
    optimizer: int
    masters: int
    buckets: int
    host: int

    @classmethod
    def of(
        cls,
        model: TransformerConfig,
        parts: Shards,
        strategy: Strategy,
        offload: Offload,
        state_bits: int = 32,
    ) -> State:
        """Of one process of the strategy."""
        zero = strategy.zero_stage > 0
        whole = F32 * model.parameter_count()
        weights, gradients, share = whole // parts.weights, whole // parts.gradients, whole // parts.optimizer
        buckets = whole if strategy is Strategy.DDP else 0
        if offload is Offload.NONE:
            masters = share if zero else 0
            return cls(
                weights=weights,
                gradients=gradients,
                optimizer=_moment_bytes(model, strategy, offload, state_bits) // parts.optimizer,
                masters=masters,
                buckets=buckets,
                host=0,
            )
        if not zero:  # FSDP2: weights, gradients and both moments
            return cls(weights=0, gradients=0, optimizer=0, masters=0, buckets=0, host=4 * share)
        # Masters, moments, the masters' gradients; and a buffer through which weights (ZeRO-1, ZeRO-2) or
        # gradients (ZeRO-3) travel. ZeRO-1 and ZeRO-2 send one gradient at a time, by way of two buffers.
        largest = F32 * model.hidden_size * max(model.vocab_size, model.intermediate_size, model.query_size)
        sent = largest if strategy is not Strategy.ZERO3 else 0
        both = offload is Offload.OPTIMIZER_AND_PARAMETERS
        return cls(
            weights=0 if both else weights,
            gradients=gradients if strategy is Strategy.ZERO1 else 0,
            optimizer=0,
            masters=0,
            buckets=sent,
            host=5 * share + sent + (weights if both else 0),
        )


def _moment_bytes(model: TransformerConfig, strategy: Strategy, offload: Offload, state_bits: int) -> int:
    """Both moments of the whole model; in 8 bits a byte an element and 4 for each block."""
    if state_bits == 32 or not can_have(strategy, offload):
        return 2 * F32 * model.parameter_count()
    total = 0
    for name, shape in model.parameter_shapes().items():
        count = math.prod(shape)
        total += count + F32 * -(-count // BLOCK) if is_eligible(name, shape) else F32 * count
    return 2 * total


@dataclass(frozen=True)
class Shards:
    """Into how many parts each kind of state is cut."""

    weights: int
    gradients: int
    optimizer: int


def shards(strategy: Strategy, world: int, shard_size: int) -> Shards:
    """How the strategy cuts the state over ``world`` processes, ``shard_size`` of which share a copy."""
    if strategy in {Strategy.FSDP2, Strategy.SHARD_GRAD_OP, Strategy.ZERO3}:
        return Shards(world, world, world)
    if strategy is Strategy.HSDP:
        return Shards(shard_size, shard_size, shard_size)
    if strategy is Strategy.ZERO2:
        return Shards(1, world, world)
    return Shards(1, 1, world if strategy is Strategy.ZERO1 else 1)


def _gathered(model: TransformerConfig, load: Load, strategy: Strategy) -> int:
    """Whole weights held beside a process's own: gathered ones, and autocast's copies on a GPU."""
    count, width = model.parameter_count(), load.compute_bytes
    if strategy is Strategy.SHARD_GRAD_OP:
        return width * count
    if strategy in {Strategy.FSDP2, Strategy.HSDP, Strategy.ZERO3}:
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
    normed += 2 * hidden if model.norms is Norms.BOTH else 0
    # Capped scores are held: the hyperbolic tangents and the softmax.
    scores = 2 * model.num_heads * load.seq_length if model.attn_logit_softcapping else 0
    # Two residual inputs in f32; then what linear maps, attention and the MLP keep.
    width = load.compute_bytes
    # On the CPU a norm's output is computed again; on a GPU autocast casts it for each map that reads it.
    linear_inputs = (2 if load.precision is Precision.F32 else 5) * hidden if load.cuda else 0
    gates = 4 * inner if load.cuda else 2 * inner
    per_token = (
        F32 * 2 * hidden
        + width * (linear_inputs + attention + normed + gates)
        + F32 * (model.num_heads + scores)
    )
    return load.tokens * per_token


def _end_bytes(model: TransformerConfig, load: Load) -> int:
    """Final norm's input, the head's input, and its gradient."""
    return load.tokens * model.hidden_size * (F32 + 2 * load.compute_bytes)


def _logits_bytes(model: TransformerConfig, load: Load) -> int:
    chunk = min(load.tokens, logits_chunk(load.tokens, model.vocab_size, load.compute_bytes))
    if load.cuda:
        widened = F32 if load.precision is Precision.BF16 else 0
        # The chunk before is still there while the next, perhaps shorter, is computed.
        return min(load.tokens, 2 * chunk) * model.vocab_size * (load.compute_bytes + widened)
    # The head's gradient is computed some rows at a time; their logits are copied, and again by the library.
    rows = min(HEAD_GRADIENT_ROWS, model.vocab_size)
    return (chunk * (model.vocab_size + 2 * rows) + rows * model.hidden_size) * load.compute_bytes


def _embedding_gradient_bytes(model: TransformerConfig, load: Load, *, is_cut: bool) -> int:
    """Of the embedding's gradient, the last of a backward, what is beside the one that is kept."""
    head = F32 * model.vocab_size * model.hidden_size
    if load.cuda and model.tie_word_embeddings:
        return 2 * head  # the loss may be Liger's, whose gradient autograd adds to the lookup's
    return head if load.accumulates or is_cut else 0  # whole, until it was added or sent


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


PARTS: Mapping[str, tuple[str, str]] = {
    "weights": ("weights", "in f32, and copies in the compute type"),
    "gradients": ("gradients", "of the parameters that have one then"),
    "optimizer": ("optimizer", "AdamW's two moments"),
    "masters": ("masters", "f32 weights that DeepSpeed updates"),
    "buckets": ("buckets", "from which gradients are sent"),
    "activations": ("activations", "what forward keeps for backward"),
    "loss": ("logits, head", "a chunk of logits, the head's gradient"),
    "working": ("temporary", "what backward computes on the way"),
    "unfit": ("fragmentation", "freed blocks that nothing later fits into"),
    "copies": ("copies while saving", "of weights and moments, while they are written"),
    "offloaded": ("offloaded", "in host memory, on a CPU the same memory"),
}
"""Attribute of ``Memory`` to its name and what it is, in order."""
