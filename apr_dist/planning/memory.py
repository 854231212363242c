"""How much memory a process of a run takes, from dimensions alone; nothing is built or loaded.

Every figure counts what ``model`` and the loop really keep: the tensors each layer saves for backward,
one chunk of logits, AdamW's two moments, the gradients; and on the CPU what the process holds beyond them.
The interpreter, its libraries and a GPU's context come on top and are not in any figure here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from apr_dist.choices import (
    ActivationCheckpointing,
    GradientStorage,
    Offload,
    Precision,
    Strategy,
    WeightStorage,
)
from apr_dist.model.adapters import Adapter
from apr_dist.model.config import TransformerConfig
from apr_dist.parallel.storage import EMBEDDING, PLAIN, Storage, is_narrow
from apr_dist.parallel.stored_bytes import F32, stored_bytes, trained_count
from apr_dist.planning.activations import (
    Load,
    backward_bytes,
    end_bytes,
    kept_bytes,
    layer_bytes,
    logits_bytes,
)
from apr_dist.planning.state import CHUNK, ROUNDING, State, most_possible, shards, update_bytes

UNFIT_SHARE = 0.7
"""Of freed activations and gradients, what later blocks do not fit into: measured, see `_unfit_bytes`."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process at its fullest moment, by part.

    Attributes:
        weights: parameters, and copies of f32 ones in the compute type where it is another.
        low: the bits that split weights lost.
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
        host_parts: the same by part.
    """

    weights: int
    low: int
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
    host_parts: Mapping[str, int]

    @property
    def tensors(self) -> int:
        """What tensors take, without what else the process holds."""
        return self.total - self.unfit - self.copies

    @property
    def total(self) -> int:
        """All parts together."""
        apart = {"moment", "offload", "host", "host_parts"}
        return sum(getattr(self, field.name) for field in fields(self) if field.name not in apart)


def estimate(
    model: TransformerConfig,
    load: Load,
    *,
    strategy: Strategy,
    world_size: int,
    shard_size: int,
    offload: Offload = Offload.NONE,
    state_bits: int = 32,
    storage: Storage = PLAIN,
    adapter: Adapter | None = None,
) -> Memory:
    """Memory of one process at its fullest moment.

    Five moments can be the fullest: the loss (all activations, the logits), the first layer of backward
    (all activations, that layer's gradients), the end of backward (all gradients), the update of weights that
    are not f32 on the device, and a save (copies).

    Args:
        model: the decoder.
        load: what one process computes at once.
        strategy: how the model is spread.
        world_size: processes in all.
        shard_size: processes that share one copy under ``hsdp``.
        offload: what lies in host memory; of what the strategy cannot keep there, as much as it can.
        state_bits: of both moments, 8 or 32; 32 where the strategy has no 8.
        storage: how weights and gradients are stored; f32 where the strategy has nothing else.
        adapter: what is trained beside the frozen weights; None: the weights.
    """
    parts = shards(strategy, world_size, shard_size)
    offload = most_possible(strategy, offload)
    storage = PLAIN if strategy.zero_stage else replace(storage, offload=offload)
    own, streams = storage.is_own(strategy), storage.streams(strategy)
    held = State.of(model, parts, strategy, offload, state_bits, storage, adapter)
    stored = stored_bytes(model, strategy, storage, state_bits, adapter)
    state: dict[str, Any] = {
        "weights": held.weights + _gathered(model, load, strategy, storage, adapter),
        "low": held.low,
        "optimizer": held.optimizer,
        "masters": held.masters,
        "buckets": held.buckets,
        "offloaded": 0 if load.cuda else held.host,
    }
    host_parts = dict(held.host_parts)
    if load.checkpointing is ActivationCheckpointing.FULL_OFFLOAD:
        host_parts["activations"] = model.num_layers * F32 * load.tokens * model.hidden_size
        state["offloaded"] += 0 if load.cuda else host_parts["activations"]
    kept = held.gradients if load.accumulates or strategy is Strategy.ZERO3 else 0
    activations = model.num_layers * kept_bytes(model, load, adapter) + end_bytes(model, load)
    copies_of_experts = _expert_copies(model, load, strategy, storage, adapter)
    if load.checkpointing is ActivationCheckpointing.OFF:
        activations += model.num_layers * copies_of_experts
    state["unfit"] = 0 if load.cuda else _unfit_bytes(gradients=held.gradients, activations=activations)
    head = _head_bytes(model, load, adapter)
    narrow = head // 2 if own and not adapter and _head_is_narrow(model, storage) else 0
    # Split weights leave a tied head f32, of which the loss makes a bf16 copy.
    tied_cast = own and model.tie_word_embeddings and storage.weights is WeightStorage.SPLIT and load.cuda
    # FSDP2 keeps what it reduced last, the root's gradients, until the next micro-batch's are reduced.
    reduced = F32 * _end_elements(model) if strategy.is_fsdp and load.accumulates and not adapter else 0
    at_loss: dict[str, Any] = {
        "gradients": kept,
        "loss": max(logits_bytes(model, load), narrow) + head + (head // 2 if tied_cast else 0),
        "working": reduced,
    }
    # A head that is not tied lets go of its gradient at once where gradients leave the device.
    waiting = 0 if adapter or (streams and not model.tie_word_embeddings) else (narrow or head)
    adds_up = load.accumulates and own and storage.gradients is GradientStorage.BF16
    rounding = ROUNDING * CHUNK if adds_up else 0
    # What a block did not keep it has again when its backward begins.
    again = layer_bytes(model, load, adapter) - kept_bytes(model, load, adapter)
    again += 0 if load.checkpointing is ActivationCheckpointing.OFF else copies_of_experts
    at_start: dict[str, Any] = {
        "gradients": kept,
        "loss": waiting,
        "working": max(backward_bytes(model, load), rounding)
        + again
        + reduced
        + (stored.largest_gradient if streams else 0)
        + _widened_bytes(model, load, adapter),
    }
    # DDP's gradients are views of its buckets, except those of micro-batches that are not sent.
    are_buckets = strategy is Strategy.DDP and not load.accumulates and not own
    # The embedding's gradient is another tensor than the one that is kept of it.
    is_cut = parts.gradients > 1 or streams or (own and storage.gradients is GradientStorage.BF16)
    at_end: dict[str, Any] = {
        "gradients": 0 if are_buckets else held.gradients,
        "loss": 0,
        "working": 0 if adapter else _embedding_gradient_bytes(model, load, is_cut=is_cut) + rounding,
    }
    copies = 0
    if load.copies:
        saved = F32 * trained_count(model, adapter) if adapter else stored.weights + stored.low
        copies = saved // parts.weights + stored.moments // parts.optimizer
        host_parts["copies of a save"] = copies
    here = 0 if load.cuda else copies
    beside = here if load.trains_meanwhile else 0
    nothing: dict[str, Any] = {"gradients": 0, "loss": 0, "working": 0}
    updating = update_bytes(storage, state_bits, streams=streams) if own or not storage.is_plain else 0
    at_update: dict[str, Any] = {"gradients": held.gradients, "loss": 0, "working": updating}
    host_parts = host_parts if load.cuda else {}
    apart: dict[str, Any] = {
        "offload": offload,
        "host": sum(host_parts.values()),
        "host_parts": host_parts,
    }
    fullest = [
        Memory(**state, **at_loss, activations=activations, copies=beside, moment="loss", **apart),
        Memory(
            **state, **at_start, activations=activations, copies=beside, moment="start of backward", **apart
        ),
        Memory(**state, **at_end, activations=0, copies=beside, moment="end of backward", **apart),
        Memory(**state, **nothing, activations=0, copies=here, moment="save", **apart),
    ]
    if updating:
        fullest.append(Memory(**state, **at_update, activations=0, copies=beside, moment="update", **apart))
    return max(fullest, key=lambda moment: moment.total)


def _gathered(
    model: TransformerConfig,
    load: Load,
    strategy: Strategy,
    storage: Storage,
    adapter: Adapter | None = None,
) -> int:
    """Whole weights held beside a process's own: gathered ones, and autocast's copies on a GPU.

    Autocast keeps copies of what is trained; of a frozen matrix it makes one whenever it is used.
    """
    count, width = model.parameter_count(), load.compute_bytes
    if strategy is Strategy.SHARD_GRAD_OP:
        return width * count
    if strategy in {Strategy.FSDP2, Strategy.HSDP, Strategy.ZERO3}:
        ends = _end_elements(model)
        # This block and the next, which is fetched meanwhile, beside embedding and head.
        return width * (ends + 2 * (count - ends) // model.num_layers)
    casts = load.cuda and load.precision is Precision.BF16 and storage.weights is WeightStorage.F32
    experts = model.num_layers * _expert_elements(model) if adapter is None else 0
    return width * (trained_count(model, adapter) - experts) if casts else 0


def _expert_elements(model: TransformerConfig) -> int:
    """Elements of the experts of a block."""
    return 3 * (model.num_experts or 0) * model.expert_size * model.hidden_size


def _expert_copies(
    model: TransformerConfig, load: Load, strategy: Strategy, storage: Storage, adapter: Adapter | None
) -> int:
    """Copies of a block's experts in the compute type, which its products keep from forward to backward."""
    replicas = strategy in {Strategy.SINGLE, Strategy.DDP} or strategy.zero_stage
    stored = adapter.base_bits < 32 if adapter is not None else storage.weights is not WeightStorage.F32
    casts = load.cuda and load.precision is Precision.BF16 and replicas and not stored
    return load.compute_bytes * _expert_elements(model) if casts else 0


def _end_elements(model: TransformerConfig) -> int:
    """Elements of embedding and head."""
    return model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)


def _head_is_narrow(model: TransformerConfig, storage: Storage) -> bool:
    """Whether the loss gives the head's gradient, which it adds up in f32, as bf16.

    That of a tied head is of the weight's own type; its rows' gradients are added to it in f32.
    """
    if model.tie_word_embeddings:
        return is_narrow(EMBEDDING, (1, 1), Strategy.SINGLE, storage.weights)
    return storage.weights is not WeightStorage.F32 and storage.gradients is GradientStorage.BF16


def _head_bytes(model: TransformerConfig, load: Load, adapter: Adapter | None) -> int:
    """The head's gradient; of a frozen head its copy in the compute type, where that is another."""
    elements = model.vocab_size * model.hidden_size
    if adapter is None:
        return elements * F32
    if adapter.tokens:  # its gradient, and the matrix with the trained rows in it
        return elements * (F32 + adapter.base_bytes("lm_head.weight", (1, 1)))
    stored = adapter.base_bytes("lm_head.weight", (1, 1))
    return 0 if stored == load.compute_bytes else elements * load.compute_bytes


def _widened_bytes(model: TransformerConfig, load: Load, adapter: Adapter | None) -> int:
    """The largest frozen matrix of a block in the compute type, where a product makes it of fewer bits."""
    if adapter is None or adapter.base_bits >= 8 * load.compute_bytes:
        return 0
    inner = max(model.intermediate_size, model.query_size)
    # Of int8 its f32 values come first.
    return inner * model.hidden_size * (load.compute_bytes + (2 * F32 if adapter.base_bits == 8 else 0))


def _embedding_gradient_bytes(model: TransformerConfig, load: Load, *, is_cut: bool) -> int:
    """Of the embedding's gradient, the last of a backward, what is beside the one that is kept."""
    head = F32 * model.vocab_size * model.hidden_size
    if load.liger and model.tie_word_embeddings:
        return 2 * head  # autograd adds the gradient of Liger's loss to the lookup's
    return head if load.accumulates or is_cut else 0  # whole, until it was added or sent


def _unfit_bytes(*, gradients: int, activations: int) -> int:
    """Holes of the heap: gradients and activations take turns in the same memory, in blocks of other sizes.

    Freed memory is kept (``model.host_memory``), so the process stays as large as its blocks ever reached.
    How much of the smaller of the two finds no place in the other's was measured on five shapes of 27 and 34
    million parameters: 0.4 to 1.0 of it. ``tests/test_people_plan.py`` compares the whole with real runs.
    """
    return int(UNFIT_SHARE * min(gradients, activations))


PARTS: Mapping[str, tuple[str, str]] = {
    "weights": ("weights", "and copies of f32 ones in the compute type"),
    "low": ("low bits", "which split weights lost to rounding"),
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
