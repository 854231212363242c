"""What one process computes at once, and what a block and the ends of the model hold for it, in bytes.

The formulas count the tensors that each layer saves for backward and those that backward makes on its way;
parameters, gradients and moments are ``planning.state``'s.
"""

from __future__ import annotations

from dataclasses import dataclass

from apr_dist.choices import ActivationCheckpointing, AdapterKind, Precision
from apr_dist.model.adapters import Adapter
from apr_dist.model.config import TransformerConfig
from apr_dist.model.families import Norms
from apr_dist.model.flops import HEAD_GRADIENT_ROWS, logits_chunk
from apr_dist.parallel.stored_bytes import F32


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
        liger: whether the loss is Liger's, as on a GPU where that is installed.
    """

    micro_batch: int
    seq_length: int
    accumulates: bool
    precision: Precision
    cuda: bool
    checkpointing: ActivationCheckpointing = ActivationCheckpointing.OFF
    copies: bool = False
    trains_meanwhile: bool = False
    liger: bool = False

    @property
    def tokens(self) -> int:
        """Tokens per forward."""
        return self.micro_batch * self.seq_length

    @property
    def compute_bytes(self) -> int:
        """Bytes of one element of the compute type."""
        return 2 if self.precision is Precision.BF16 else F32


def kept_bytes(model: TransformerConfig, load: Load, adapter: Adapter | None = None) -> int:
    """Bytes one block keeps from its forward to its backward, checkpointed as the load says."""
    if load.checkpointing is ActivationCheckpointing.OFF:
        return layer_bytes(model, load, adapter)
    if load.checkpointing is ActivationCheckpointing.FULL_OFFLOAD:
        return 0
    per_token = F32 * model.hidden_size
    if load.checkpointing is ActivationCheckpointing.SELECTIVE:
        # Of the products q, k, v, o, gate, up, down every second from the first; and attention's result.
        products = model.query_size + model.kv_size + model.hidden_size
        products += model.intermediate_size if model.num_experts is None else 0
        per_token += load.compute_bytes * (products + model.query_size) + F32 * model.num_heads
    return load.tokens * per_token


def layer_bytes(model: TransformerConfig, load: Load, adapter: Adapter | None = None) -> int:
    """Bytes one block needs for backward."""
    hidden = model.hidden_size
    attention = 2 * model.query_size + 2 * model.kv_size
    normed = model.query_size + model.kv_size if model.qk_norm else 0
    normed += 2 * hidden if model.norms is Norms.BOTH else 0
    # Capped scores are held: the hyperbolic tangents and the softmax.
    scores = 2 * model.num_heads * load.seq_length if model.attn_logit_softcapping else 0
    # Two residual inputs in f32; then what linear maps, attention and the MLP keep.
    width = load.compute_bytes
    # On the CPU a norm's output is computed again; on a GPU autocast casts it for each map that reads it.
    linear_inputs = (2 if load.precision is Precision.F32 else 5) * hidden if load.cuda else 0
    gates = _mlp_elements(model, load, frozen=adapter is not None)
    if adapter is not None and load.cuda:  # a frozen map keeps no input
        linear_inputs = 0
    per_token = (
        F32 * 2 * hidden
        + width * (linear_inputs + attention + normed + gates)
        + F32 * (model.num_heads + scores)
        + _router_bytes(model, load)
    )
    beside = 0 if adapter is None else adapter_bytes(model, load, adapter)
    return load.tokens * per_token + beside


def _mlp_elements(model: TransformerConfig, load: Load, *, frozen: bool) -> int:
    """Elements of the compute type that the MLP of a block keeps per token, without its input.

    Experts keep what they are given, which is a copy for each expert of a token, and what each gives.
    """
    inner, each = model.expert_size, model.active_experts
    if model.num_experts is None:
        return (3 if frozen else 4) * inner if load.cuda else 2 * inner
    inputs = 0 if frozen else model.hidden_size + inner
    return each * (inputs + model.hidden_size + (3 if load.cuda else 2) * inner)


def _router_bytes(model: TransformerConfig, load: Load) -> int:
    """Bytes that a block's router keeps per token: its input, logits and shares in f32, and places."""
    if model.num_experts is None:
        return 0
    wide = 0 if load.precision is Precision.F32 else model.hidden_size
    return F32 * (wide + 2 * model.num_experts) + (3 * 8 + 3 * F32) * model.active_experts


def adapter_bytes(model: TransformerConfig, load: Load, adapter: Adapter) -> int:
    """Bytes that the adapter of one block, the fullest, keeps from its forward to its backward.

    The first factor keeps its input, which maps of the same input share unless each casts or drops of it; the
    second keeps what the first gives; DoRA also both results of every map, and the matrix whose rows it
    measures.
    """
    shapes, blocks = model.parameter_shapes(), dict[str, list[tuple[str, int, int]]]()
    for module in adapter.modules:
        block, _, last = module.rpartition(".")
        outputs, inputs = shapes[f"{module}.weight"]
        blocks.setdefault(block.rpartition(".")[0], []).append((last, outputs, inputs))
    sources = {"q_proj": "norm", "k_proj": "norm", "v_proj": "norm", "gate_proj": "norm2", "up_proj": "norm2"}
    most = 0
    for maps in blocks.values():
        own = adapter.dropout > 0 or load.precision is not Precision.F32
        read = {last if own else sources.get(last, last): inputs for last, _, inputs in maps}
        per_token = sum(read.values()) + len(maps) * adapter.rank
        if adapter.dropout:  # and what was dropped
            per_token += sum(inputs for _, _, inputs in maps)
        whole = 0
        if adapter.kind is AdapterKind.DORA:
            per_token += 2 * sum(outputs for _, outputs, _ in maps)
            whole = F32 * max(outputs * inputs for _, outputs, inputs in maps)
        most = max(most, load.tokens * per_token * load.compute_bytes + whole)
    return most


def end_bytes(model: TransformerConfig, load: Load) -> int:
    """Final norm's input, the head's input, and its gradient."""
    return load.tokens * model.hidden_size * (F32 + 2 * load.compute_bytes)


def logits_bytes(model: TransformerConfig, load: Load) -> int:
    """One chunk of logits, and what the loss makes of it."""
    chunk = min(load.tokens, logits_chunk(load.tokens, model.vocab_size, load.compute_bytes))
    if load.cuda:
        widened = F32 if load.precision is Precision.BF16 else 0
        return chunk * model.vocab_size * (load.compute_bytes + widened)
    # The head's gradient is computed some rows at a time; their logits are copied, and again by the library.
    rows = min(HEAD_GRADIENT_ROWS, model.vocab_size)
    return (chunk * (model.vocab_size + 2 * rows) + rows * model.hidden_size) * load.compute_bytes


def backward_bytes(model: TransformerConfig, load: Load) -> int:
    """The gradients of gate, up, their product and the recomputed product, with the residual's."""
    made = 4 * model.expert_size + (model.hidden_size if model.num_experts is not None else 0)
    computed = model.active_experts * made * load.compute_bytes
    return load.tokens * (computed + 2 * F32 * model.hidden_size)
