"""The form of a family's file: what it states, and what may become of one key of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final


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


@dataclass(frozen=True, kw_only=True)
class GgufForm:
    """How a family lies in a GGUF file.

    Attributes:
        architecture: ``general.architecture``.
        tensors: Hugging Face names of the tensors by their GGUF names; of blocks without their prefix.
        imported: whether a file of that architecture is read as this family.
        permuted: rows of q and k are stored for adjacent pairs.
        rope_factors: a ``rope_freqs.weight`` is read by that architecture.
        keys: keys of its own, without the architecture's prefix, over those that all families have.
    """

    architecture: str
    tensors: Mapping[str, str]
    imported: bool = True
    permuted: bool = False
    rope_factors: bool = False
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
        sliding_window: attention may be limited to a window.
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
    sliding_window: bool = False
    head_dim_stated: bool = False
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


FULL_ATTENTION: Final = "full_attention"
SLIDING_ATTENTION: Final = "sliding_attention"
"""Names in ``layer_types`` of a ``config.json``."""
