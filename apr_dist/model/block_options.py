"""What a block does differently from Llama's by number: the options of a configuration, and their checks.

What is fixed for a family (norms, activation) is in its file; which of these options its models may set is
there too. Each has a neutral default, by which nothing is computed differently. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from apr_dist.model.families import FULL_ATTENTION, SLIDING_ATTENTION, FamilyDefinition
from apr_dist.model.rope_scaling import one_of, refuse_key


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """The options, by the names of a Hugging Face ``config.json`` where it has one.

    Attributes:
        layer_types: which positions each layer sees, ``full_attention`` or ``sliding_attention``; None: all
            layers are alike.
        no_rope_layers: 1 for each layer that rotates q and k, 0 for one that does not; None: all do.
        rope_local_theta: base of the rotary frequencies of layers with a window.
        partial_rotary_factor: share of a head's dimensions that are rotated, the first ones.
        llama_4_scaling_beta: queries are multiplied by ``1 + beta * ln(1 + floor(position / original))``
            with the original length of the RoPE scaling.
        query_pre_attn_scalar: scores are divided by its square root instead of that of the head's size.
        attention_multiplier: scores are multiplied by it instead.
        attn_logit_softcapping: scores ``s`` become ``cap * tanh(s / cap)``.
        final_logit_softcapping: logits likewise.
        embedding_multiplier: embeddings are multiplied by it.
        residual_multiplier: what attention and MLP add to the residual stream is multiplied by it.
        logits_scaling: logits are divided by it.
    """

    layer_types: tuple[str, ...] | None = None
    no_rope_layers: tuple[int, ...] | None = None
    rope_local_theta: float | None = None
    partial_rotary_factor: float = 1.0
    llama_4_scaling_beta: float | None = None
    query_pre_attn_scalar: float | None = None
    attention_multiplier: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0

    def set_options(self) -> dict[str, Any]:
        """The options that are not neutral, as JSON values."""
        values = {name: getattr(self, name) for name in OPTIONS}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value != OPTIONS[name]
        }

    def check_options(self, family: str, facts: FamilyDefinition, *, layers: int, window: int | None) -> None:
        """Refuse values that are impossible, and options that the family's block does not have.

        Raises:
            ArchitectureRefused: one is; the text names it.
        """
        for name, neutral in OPTIONS.items():
            value = getattr(self, name)
            if value == neutral and not isinstance(value, bool):
                continue
            if name not in facts.options:
                raise refuse_key(name, value, f"{_said(neutral)} for the {family} family")
            if name not in _PER_LAYER and not _is_positive(value):
                raise refuse_key(name, value, "a positive, finite number")
        self._check_layers(facts, layers=layers, window=window)
        if not 0.0 < self.partial_rotary_factor <= 1.0:
            raise refuse_key("partial_rotary_factor", self.partial_rotary_factor, "at most 1")

    def _check_layers(self, facts: FamilyDefinition, *, layers: int, window: int | None) -> None:
        for name, allowed in _PER_LAYER.items():
            value = getattr(self, name)
            if value is None:
                if name in facts.options:
                    raise refuse_key(name, None, f"a list with an entry for each of the {layers} layers")
            elif (
                not isinstance(value, tuple)
                or len(value) != layers
                or any(one not in allowed for one in value)
            ):
                shown = list(dict.fromkeys(value)) if isinstance(value, tuple) else value
                expected = f"{one_of([str(one) for one in allowed])} for each of the {layers} layers"
                raise refuse_key(name, shown, expected)
        windowed = SLIDING_ATTENTION in (self.layer_types or ())
        if windowed and window is None:
            raise refuse_key(
                "sliding_window", None, "a positive integer, as layer_types names layers with one"
            )
        if facts.local_rope and self.rope_local_theta is None:
            raise refuse_key("rope_local_theta", None, "a positive number")


_PER_LAYER: Final[Mapping[str, tuple[Any, ...]]] = {
    "layer_types": (FULL_ATTENTION, SLIDING_ATTENTION),
    "no_rope_layers": (0, 1),
}
"""Options with an entry for each layer, and the entries that there are."""

OPTIONS: Final[Mapping[str, Any]] = {
    name: field.default for name, field in BlockOptions.__dataclass_fields__.items()
}
"""Neutral value of each option by its name."""


def stated_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that metadata state, as fields of a configuration."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name in OPTIONS
        if (value := values.get(name)) is not None
    }


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _said(neutral: object) -> str:
    return "null" if neutral is None else str(neutral)
