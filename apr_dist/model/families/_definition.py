"""The form of a family's file: what it states, and what may become of one key of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from apr_dist.model.rope_scaling import RopeScalingType


class Effect(StrEnum):
    """What becomes of one key of a source's configuration."""

    READ = "read"
    CHECKED = "one value"
    LEFT_OUT = "left out with a note"
    IRRELEVANT = "no effect"


@dataclass(frozen=True, kw_only=True)
class Key:
    """What becomes of one key.

    Attributes:
        effect: whether it is read, has to have a certain value, or changes nothing.
        why: one clause for the documentation and for refusals.
        ours: the metadata key of ours that a plain value becomes.
        accepted: values that mean what the decoder computes.
        dropped: an export no longer states the key.
    """

    effect: Effect
    why: str
    ours: str | None = None
    accepted: tuple[Any, ...] = ()
    dropped: bool = False

    def accepts(self, value: object) -> bool:
        """Whether a value is one of the accepted ones; 1 is 1.0 here and not True."""
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.accepted)


def read(ours: str | None = None, why: str = "") -> Key:
    """A key that is read; as a plain value it becomes ``ours``."""
    return Key(effect=Effect.READ, why=why or f"becomes {ours}", ours=ours)


def only(*accepted: Any, why: str) -> Key:
    """A key that must have one of these values, because the decoder computes nothing else."""
    return Key(effect=Effect.CHECKED, why=why, accepted=accepted)


def left_out(why: str, *, unless: tuple[Any, ...] = (), dropped: bool = False) -> Key:
    """A key that is left out with a note, unless its value asks for nothing."""
    return Key(effect=Effect.LEFT_OUT, why=why, accepted=unless, dropped=dropped)


def irrelevant(why: str) -> Key:
    """A key that changes neither arithmetic nor tokens nor where a text stops."""
    return Key(effect=Effect.IRRELEVANT, why=why)


class Norms(StrEnum):
    """Where a block has norms: before attention and MLP, after them, or both."""

    BEFORE = "before"
    AFTER = "after"
    BOTH = "before and after"

    @property
    def names(self) -> tuple[tuple[str | None, str | None], tuple[str | None, str | None]]:
        """Names of the norms before and after attention, and before and after the MLP."""
        return _NORM_NAMES[self]


_Names = tuple[str | None, str | None]
_NORM_NAMES: Final[Mapping[Norms, tuple[_Names, _Names]]] = {
    Norms.BEFORE: (("input_layernorm", None), ("post_attention_layernorm", None)),
    Norms.AFTER: ((None, "post_attention_layernorm"), (None, "post_feedforward_layernorm")),
    Norms.BOTH: (
        ("input_layernorm", "post_attention_layernorm"),
        ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
}


class Activation(StrEnum):
    """What an MLP applies to its gate, by the name in a ``config.json``."""

    SILU = "silu"
    GELU_TANH = "gelu_pytorch_tanh"


@dataclass(frozen=True, kw_only=True)
class GgufForm:
    """How a family lies in a GGUF file.

    Attributes:
        architecture: ``general.architecture``.
        tensors: Hugging Face names of the tensors by their GGUF names; of blocks without their prefix.
        imported: whether a file of that architecture is read as this family.
        exported: whether such a file is written.
        permuted: rows of q and k are stored for adjacent pairs.
        rope_factors: a ``rope_freqs.weight`` is read by that architecture.
        long_factors: LongRoPE's factors are read from tensors by that architecture.
        even_heads: llama.cpp takes hidden size over heads as the size of a head.
        own_head: llama.cpp needs an ``output.weight``, and takes no tied head.
        stated_by: key without which a file of that architecture is of another family.
        norm_shift: what is added to the weights of norms, as llama.cpp multiplies by them alone.
        absent: values of keys that a file may leave out, by our names, as llama.cpp takes them.
        wide_queries_at: number of layers of the model whose queries llama.cpp scales by hidden size over
            heads instead of the size of a head; only for families with ``query_pre_attn_scalar``.
        keys: keys of its own, without the architecture's prefix, over those that all families have.
    """

    architecture: str
    tensors: Mapping[str, str]
    imported: bool = True
    exported: bool = True
    permuted: bool = False
    rope_factors: bool = False
    long_factors: bool = False
    even_heads: bool = False
    own_head: bool = False
    stated_by: str | None = None
    norm_shift: float = 0.0
    absent: Mapping[str, Any] = field(default_factory=dict)
    wide_queries_at: int = 0
    keys: Mapping[str, Key] = field(default_factory=dict)


_SIZES = (
    *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    *("intermediate_size", "max_position_embeddings", "rope_theta", "rms_norm_eps", "tie_word_embeddings"),
)


def sizes(*values: int | float | bool, **more: Any) -> dict[str, Any]:
    """A published configuration as fields of ``TransformerConfig``.

    In this order: vocabulary, hidden size, layers, heads, KV heads, size of a head, inner size of the MLP,
    positions, theta, epsilon, and whether the head is tied; ``more`` by name.
    """
    return dict(zip(_SIZES, values, strict=True)) | more


@dataclass(frozen=True, kw_only=True)
class FamilyDefinition:
    """Everything that one family is.

    Attributes:
        slug: its name in metadata and on the command line.
        hf_architecture: class name in a ``config.json``.
        hf_model_type: ``model_type`` in a ``config.json``; other model types are not this family.
        claims: other texts in metadata that mean this family.
        named_like: slug of the family whose tensor names it has.
        tensor_marks: patterns of tensor names; the family with the longest tuple of which all occur is
            the one that names show.
        hf_keys: keys of a ``config.json`` of its own, over those that all families have.
        hf_defaults: what ``transformers`` takes for a key of ``config.json`` that is absent.
        gguf: how it lies in a GGUF file.
        pre_tokenizers: GGUF names of its pre-tokenizers, the preferred one first.
        qkv_bias: q, k and v projections always add a bias.
        optional_attention_bias: q, k, v and o add biases where the configuration says so.
        qk_norm: each head of q and k passes an RMSNorm before RoPE.
        qk_norm_whole: that norm is over all heads together.
        norms: where a block has norms.
        one_plus_norms: norms multiply by one plus their weight.
        activation: what the MLP applies to its gate.
        root_embedding: embeddings are multiplied by the square root of the hidden size.
        sliding_window: attention may be limited to a window.
        full_every: of so many layers the last sees all positions and the others a window, where a
            configuration does not list its layers.
        no_rope_every: of so many layers the last rotates nothing, where a configuration does not list them.
        local_rope: layers with a window rotate by ``rope_local_theta``, which no scaling stretches.
        rope_scalings: types of RoPE scaling that its models have.
        rope_aliases: other names of such types in a ``config.json``.
        rope_default: ``rope_parameters`` of a ``config.json`` that states none.
        joined: modules of ours by the module that holds their rows one after another in other formats.
        options: fields of ``block_options.BlockOptions`` that a model of the family may set.
        head_dim_stated: a file must state ``head_dim``; otherwise it may follow from the other sizes.
        presets: published configurations by name, as fields of ``TransformerConfig``.
    """

    slug: str
    hf_architecture: str
    hf_model_type: str
    claims: tuple[str, ...] = ()
    named_like: str | None = None
    tensor_marks: tuple[tuple[str, ...], ...] = ()
    hf_keys: Mapping[str, Key] = field(default_factory=dict)
    hf_defaults: Mapping[str, Any]
    gguf: GgufForm
    pre_tokenizers: tuple[str, ...] = ()
    qkv_bias: bool = False
    optional_attention_bias: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    norms: Norms = Norms.BEFORE
    one_plus_norms: bool = False
    activation: Activation = Activation.SILU
    root_embedding: bool = False
    sliding_window: bool = False
    full_every: int | None = None
    no_rope_every: int | None = None
    local_rope: bool = False
    rope_scalings: tuple[RopeScalingType, ...] = tuple(RopeScalingType)
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    rope_default: Mapping[str, Any] = field(default_factory=dict)
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    head_dim_stated: bool = False
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


FULL_ATTENTION: Final = "full_attention"
SLIDING_ATTENTION: Final = "sliding_attention"
"""Names in ``layer_types`` of a ``config.json``."""


def layer_kinds(layers: int, full_every: int) -> tuple[str, ...]:
    """``layer_types`` of a model of which every so many layers the last sees all positions."""
    return tuple(SLIDING_ATTENTION if (i + 1) % full_every else FULL_ATTENTION for i in range(layers))


def rope_layers(layers: int, no_rope_every: int) -> tuple[int, ...]:
    """``no_rope_layers`` of a model of which every so many layers the last rotates nothing."""
    return tuple(int((i + 1) % no_rope_every != 0) for i in range(layers))
