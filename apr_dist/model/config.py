"""What a model is: its family, its dimensions, and the shapes of its parameters.

A configuration comes from a preset or from a model file's metadata, never from defaults filled in
between. What one family is, its presets included, is in its file in ``families``; the network that is
built from a configuration is in ``transformer``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from apr_dist.errors import ArchitectureRefused, DimensionsUnstated, UsageError
from apr_dist.model.block_options import BlockOptions, stated_options
from apr_dist.model.families import SLIDING_ATTENTION, Activation, Family, FamilyDefinition, Norms
from apr_dist.model.rope_scaling import (
    INCOMPLETE_METADATA,
    RopeScaling,
    RopeScalingType,
    one_of,
    refuse_key,
)

SPLIT_HALVES: Final = 2
"""``rope_type`` of the format: dimension ``i`` is rotated with ``i + head_dim / 2``."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(BlockOptions):
    """Everything that decides the shapes and the arithmetic of one decoder.

    Sizes are numbers of elements, ``max_position_embeddings`` and ``sliding_window`` numbers of tokens.
    ``attention_bias`` adds biases to q, k, v and o; whether q, k and v have them anyway and whether q and k
    are normalised follows from the family. Further options are those of `BlockOptions`.

    Raises:
        ArchitectureRefused: on construction, when a field is impossible; the text names it.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    attention_bias: bool = False

    def __post_init__(self) -> None:
        for name in (*_INTEGER_KEYS, "head_dim"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise refuse_key(name, value, "a positive integer")
        for name in _NUMBER_KEYS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise refuse_key(name, value, "a positive, finite number")
        if self.num_heads % self.num_kv_heads:
            raise refuse_key("num_heads", self.num_heads, f"a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise refuse_key("head_dim", self.head_dim, "an even number, because RoPE rotates pairs")
        self._check_options()
        self.check_options(self.family, self._facts, layers=self.num_layers, window=self.sliding_window)

    def _check_options(self) -> None:
        """Refuse what the family's block does not have."""
        if type(self.attention_bias) is not bool:
            raise refuse_key("attention_bias", self.attention_bias, "true or false")
        if self.attention_bias and not self._facts.optional_attention_bias:
            raise refuse_key("attention_bias", True, f"false for the {self.family} family")
        if self.sliding_window is not None:
            if not self._facts.sliding_window:
                raise refuse_key("sliding_window", self.sliding_window, f"null for the {self.family} family")
            if type(self.sliding_window) is not int or self.sliding_window < 1:
                raise refuse_key("sliding_window", self.sliding_window, "a positive integer or null")
        self._check_rope()

    def _check_rope(self) -> None:
        """Refuse a scaling that the family's models do not have, or that does not fit the other sizes."""
        scaling, allowed = self.rope_scaling, self._facts.rope_scalings
        if scaling is not None:
            if scaling.rope_type not in allowed:
                expected = f"{one_of(allowed)} for the {self.family} family"
                raise refuse_key("rope_scaling.rope_type", scaling.rope_type.value, expected)
            for name in ("short_factor", "long_factor"):
                factors = getattr(scaling, name)
                if factors is not None and 2 * len(factors) != self.rotary_dim:
                    expected = f"{self.rotary_dim // 2} numbers, one for each pair of rotated dimensions"
                    raise refuse_key(f"rope_scaling.{name}", f"{len(factors)} numbers", expected)
        original = scaling.original_max_position_embeddings if scaling else None
        if "llama_4_scaling_beta" in self._facts.options and self.llama_4_scaling_beta and original is None:
            expected = "set, as llama_4_scaling_beta counts by it"
            raise refuse_key("rope_scaling.original_max_position_embeddings", None, expected)

    @property
    def _facts(self) -> FamilyDefinition:
        return self.family.definition

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v projections add a bias."""
        return self._facts.qkv_bias or self.attention_bias

    @property
    def qk_norm(self) -> bool:
        """Whether each head of q and k passes an RMSNorm before RoPE."""
        return self._facts.qk_norm

    @property
    def qk_norm_whole(self) -> bool:
        """Whether that norm is over all heads together."""
        return self._facts.qk_norm_whole

    @property
    def norms(self) -> Norms:
        """Where a block has norms."""
        return self._facts.norms

    @property
    def one_plus_norms(self) -> bool:
        """Whether norms multiply by one plus their weight."""
        return self._facts.one_plus_norms

    @property
    def activation(self) -> Activation:
        """What the MLP applies to its gate."""
        return self._facts.activation

    @property
    def embedding_scale(self) -> float:
        """What embeddings are multiplied by."""
        return math.sqrt(self.hidden_size) if self._facts.root_embedding else self.embedding_multiplier

    @property
    def attention_scale(self) -> float:
        """What scores of attention are multiplied by."""
        if self.attention_multiplier is not None:
            return self.attention_multiplier
        return 1.0 / math.sqrt(self.query_pre_attn_scalar or self.head_dim)

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated, the first ones."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def turning_length(self) -> int | None:
        """Tokens of a sequence beyond which all its positions rotate by LongRoPE's other factors."""
        scaling = self.rope_scaling
        if scaling is None or scaling.rope_type is not RopeScalingType.LONGROPE:
            return None
        return scaling.original_max_position_embeddings

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence that can be trained; dynamic scaling stretches it by its factor."""
        scaling = self.rope_scaling
        stretched = scaling is not None and scaling.rope_type is RopeScalingType.DYNAMIC
        return int(self.max_position_embeddings * (scaling.factor if scaling and stretched else 1.0))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Positions that each layer sees, its own among them; None: all before it."""
        kinds = self.layer_types or (SLIDING_ATTENTION,) * self.num_layers
        return tuple(self.sliding_window if kind == SLIDING_ATTENTION else None for kind in kinds)

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    @classmethod
    def from_metadata(
        cls, values: Mapping[str, Any], *, family: Family, where: str | Path, tie_word_embeddings: bool
    ) -> TransformerConfig:
        """The configuration a model file states; nothing is filled in that the file does not say.

        ``head_dim`` alone may be absent, for families where it is hidden_size / num_heads.

        Raises:
            ArchitectureRefused: keys are missing (all are named), of the wrong kind, contradictory, or
                ask for something this network does not compute (experts, adjacent-pair RoPE).
        """
        _refuse_missing(values, family, where)
        if values.get("num_experts"):
            raise refuse_key("num_experts", values["num_experts"], "a dense model (no experts)", where=where)
        if values.get("rope_type") not in (None, SPLIT_HALVES):
            raise ArchitectureRefused(
                f"rope_type is {values['rope_type']!r}: rows of q and k for another pairing of dimensions",
                where=where,
                expected=f"{SPLIT_HALVES} (split halves), as Hugging Face tensors have",
                remedy=f"apr-dist import {where} -o split-halves.apr reorders the rows",
                falsifier=INCOMPLETE_METADATA,
            )
        sizes: dict[str, Any] = {key: _positive_integer(values, key, where) for key in _INTEGER_KEYS}
        try:
            return cls(
                family=family,
                **sizes,
                head_dim=_head_dim(values, sizes, where),
                rope_theta=values["rope_theta"],
                rms_norm_eps=values["rms_norm_eps"],
                tie_word_embeddings=tie_word_embeddings,
                rope_scaling=RopeScaling.from_mapping(values.get("rope_scaling"), where=where),
                sliding_window=_sliding_window(values, family, where),
                attention_bias=_attention_bias(values, family),
                **stated_options(values),
            )
        except ArchitectureRefused as refusal:
            refusal.where = str(where)
            raise

    def to_metadata(self) -> dict[str, Any]:
        """The keys ``from_metadata`` reads, plus who the model is, as an APR file states them."""
        values: dict[str, Any] = {
            "architecture": self.family.value,
            "hf_architecture": self.family.hf_architecture,
            "hf_model_type": self.family.hf_model_type,
            **{key: getattr(self, key) for key in _INTEGER_KEYS},
            "rope_theta": float(self.rope_theta),
            "rope_type": SPLIT_HALVES,
            "rms_norm_eps": float(self.rms_norm_eps),
            "head_dim": self.head_dim,
            "tie_word_embeddings": self.tie_word_embeddings,
        }
        if self.rope_scaling is not None:
            values["rope_scaling"] = self.rope_scaling.to_mapping()
        if self.sliding_window is not None:
            values["sliding_window"] = self.sliding_window
        if self.attention_bias:
            values["attention_bias"] = True
        return values | self.set_options()

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by its Hugging Face name, in the order of the network."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size)
        }
        block = self._block_shapes()
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            shapes.update({prefix + name: shape for name, shape in block.items()})
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def kinds_of_parameters(self) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """Name, shape and number of every kind of parameter; the first block's stand for those of all."""
        yield "model.embed_tokens.weight", (self.vocab_size, self.hidden_size), 1
        for name, shape in self._block_shapes().items():
            yield f"model.layers.0.{name}", shape, self.num_layers
        yield "model.norm.weight", (self.hidden_size,), 1
        if not self.tie_word_embeddings:
            yield "lm_head.weight", (self.vocab_size, self.hidden_size), 1

    def parameter_count(self) -> int:
        """Number of trainable values; a tied head counts once."""
        block = sum(math.prod(shape) for shape in self._block_shapes().values())
        ends = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2) + self.hidden_size
        return self.num_layers * block + ends

    def _block_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, inner = self.hidden_size, self.intermediate_size
        (before, after), (mlp_before, mlp_after) = self.norms.names
        shapes = _norm_shapes(before, hidden)
        for name, size in (("q", self.query_size), ("k", self.kv_size), ("v", self.kv_size)):
            shapes[f"self_attn.{name}_proj.weight"] = (size, hidden)
            if self.qkv_bias:
                shapes[f"self_attn.{name}_proj.bias"] = (size,)
        shapes["self_attn.o_proj.weight"] = (hidden, self.query_size)
        if self.attention_bias:
            shapes["self_attn.o_proj.bias"] = (hidden,)
        if self.qk_norm:
            whole = self.qk_norm_whole
            shapes["self_attn.q_norm.weight"] = (self.query_size if whole else self.head_dim,)
            shapes["self_attn.k_norm.weight"] = (self.kv_size if whole else self.head_dim,)
        shapes |= _norm_shapes(after, hidden) | _norm_shapes(mlp_before, hidden)
        shapes["mlp.gate_proj.weight"] = shapes["mlp.up_proj.weight"] = (inner, hidden)
        shapes["mlp.down_proj.weight"] = (hidden, inner)
        return shapes | _norm_shapes(mlp_after, hidden)


def _norm_shapes(name: str | None, size: int) -> dict[str, tuple[int, ...]]:
    """The shape of a block's norm by its name, where the block has it."""
    return {} if name is None else {f"{name}.weight": (size,)}


_INTEGER_KEYS = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "vocab_size",
    "intermediate_size",
    "max_position_embeddings",
)
_NUMBER_KEYS = ("rope_theta", "rms_norm_eps")


def preset(name: str) -> TransformerConfig:
    """The published configuration of that name (see ``PRESETS``).

    Raises:
        UsageError: no preset of that name; the text suggests the nearest.
    """
    try:
        return PRESETS[name]
    except KeyError:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
        raise UsageError(
            f"there is no model preset {name!r}",
            expected=one_of(list(PRESETS)),
            remedy=f"write {near[0]!r}" if near else "choose one of them",
        ) from None


def _refuse_missing(values: Mapping[str, Any], family: Family, where: str | Path) -> None:
    needed = [*_INTEGER_KEYS, *_NUMBER_KEYS, *(["head_dim"] if family.definition.head_dim_stated else [])]
    missing = [key for key in needed if values.get(key) is None]
    if missing:
        raise DimensionsUnstated(
            f"the metadata does not state {', '.join(missing)}",
            where=where,
            expected="every dimension of the model, because none is ever guessed",
            remedy=how_to_state(where, **dict.fromkeys(missing, "VALUE")),
            falsifier=INCOMPLETE_METADATA,
        )


def is_source(where: str | Path) -> bool:
    """Whether a path is of another format than APR, with a configuration of its own."""
    return Path(where).suffix in (".json", ".gguf", ".safetensors") or Path(where).is_dir()


def how_to_state(where: str | Path, **keys: object) -> str:
    """What corrects a stated key: a stamp on an APR file, the configuration of anything else."""
    if not is_source(where):
        flags = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in keys.items())
        return f"apr-dist stamp {where} {flags} -o stamped.apr"
    if Path(where).suffix == ".gguf":
        return "export it again from its Hugging Face folder"
    return f"correct {', '.join(keys)} in {'it' if Path(where).suffix == '.json' else 'config.json'}"


def _positive_integer(values: Mapping[str, Any], key: str, where: str | Path) -> int:
    value = values[key]
    if type(value) is not int or value < 1:
        raise refuse_key(key, value, "a positive integer", where=where)
    return value


def _head_dim(values: Mapping[str, Any], sizes: Mapping[str, int], where: str | Path) -> int:
    if values.get("head_dim") is not None:
        return _positive_integer(values, "head_dim", where)
    if sizes["hidden_size"] % sizes["num_heads"]:
        raise refuse_key(
            "head_dim", None, "a number, as hidden_size is no multiple of num_heads", where=where
        )
    return sizes["hidden_size"] // sizes["num_heads"]


def _sliding_window(values: Mapping[str, Any], family: Family, where: str | Path) -> int | None:
    """The window in tokens; families without one may state one that they do not use unless told to."""
    window = values.get("sliding_window")
    if family.definition.sliding_window or window is None:
        return window
    if values.get("use_sliding_window"):
        raise refuse_key("use_sliding_window", True, f"false for the {family} family", where=where)
    return None


def _attention_bias(values: Mapping[str, Any], family: Family) -> Any:
    """What the file states; a family whose biases are fixed may state the key without using it."""
    stated = values.get("attention_bias")
    return stated if stated is not None and not family.definition.qkv_bias else False


PRESETS: Final[Mapping[str, TransformerConfig]] = {
    name: TransformerConfig(family=family, **fields)
    for family in Family
    for name, fields in family.definition.presets.items()
}
"""Published configurations by name. Llama-370M is a historical name: its dimensions give 322 M."""
