"""Odd tiny models of every family, as a ``config.json`` states them: one row a family.

Sizes are none that a published model has: heads whose size is not width over heads, tied and untied heads,
vocabularies with rows that no token has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apr_dist.model.families import Family
from builders.hf_models import SIZES, claims

FULL, SLIDING = "full_attention", "sliding_attention"
PLAIN = SIZES | {"pad_token_id": None}
WIDE_HEAD = {"head_dim": 24, "num_attention_heads": 4, "num_key_value_heads": 1}
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 300.0}
BETA = {"llama_4_scaling_beta": 0.5}


def longrope(pairs: int) -> dict[str, Any]:
    """A scaling of so many pairs of dimensions, by the key of older releases."""
    short = [1.0 + pair / 4 for pair in range(pairs)]
    return {"type": "longrope", "short_factor": short, "long_factor": [1.5 * one for one in short]}


ROWS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "llama": ({}, TIED | {"attention_bias": True, "head_dim": 12, "vocab_size": 53}),
    "qwen2": (
        {},
        TIED | {"num_key_value_heads": 4, "vocab_size": 53},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}, "max_position_embeddings": 16},
    ),
    "qwen3": (
        WIDE_HEAD,
        TIED | {"attention_bias": True, "vocab_size": 53},
        {"rope_scaling": longrope(4) | {"original_max_position_embeddings": 16}},
    ),
    "mistral": ({"sliding_window": 5}, TIED | {"head_dim": 12, "sliding_window": None}),
    "gemma2": (
        TIED | {"num_hidden_layers": 3, "sliding_window": 5, "vocab_size": 53, "query_pre_attn_scalar": 8},
        UNTIED
        | WIDE_HEAD
        | {"layer_types": [SLIDING, SLIDING], "sliding_window": 3, "query_pre_attn_scalar": 7}
        | {"attn_logit_softcapping": 0.3, "final_logit_softcapping": 0.5},
        TIED | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 4},
    ),
    "gemma3": (
        TIED | {"num_hidden_layers": 7, "sliding_window": 5, "vocab_size": 53, "query_pre_attn_scalar": 8},
        UNTIED
        | WIDE_HEAD
        | {"sliding_window_pattern": 2, "sliding_window": 3, "query_pre_attn_scalar": 7}
        | {"final_logit_softcapping": 0.5, "rope_theta": 300.0, "rope_local_base_freq": 30.0}
        | {"rope_scaling": LINEAR},
        TIED
        | {"layer_types": [FULL, SLIDING], "sliding_window": 4}
        | {"rope_parameters": {FULL: LINEAR | {"rope_theta": 500.0}, SLIDING: {"rope_type": "default"}}},
    ),
    "olmo2": ({}, WIDE_HEAD, TIED | {"num_key_value_heads": 4, "vocab_size": 53, "rope_scaling": LINEAR}),
    "olmo3": (
        {"num_hidden_layers": 5, "sliding_window": 5}
        | {"rope_parameters": {FULL: YARN, SLIDING: {"rope_type": "default", "rope_theta": 300.0}}},
        TIED | WIDE_HEAD | {"layer_types": [FULL, SLIDING], "sliding_window": 3, "rope_scaling": LINEAR},
        {"num_hidden_layers": 4}
        | {"rope_parameters": {FULL: LINEAR | {"rope_theta": 500.0}, SLIDING: {"rope_theta": 20.0}}},
    ),
    "phi3": (
        {"vocab_size": 53, "sliding_window": 70, "partial_rotary_factor": 0.75}
        | {"original_max_position_embeddings": 16, "rope_scaling": longrope(3)},
        TIED
        | {"sliding_window": 5, "original_max_position_embeddings": 32, "num_key_value_heads": 4}
        | {"rope_parameters": longrope(4) | {"rope_theta": 300.0, "attention_factor": 1.3}},
        {"partial_rotary_factor": 0.5, "num_key_value_heads": 1},
        WIDE_HEAD | {"partial_rotary_factor": 0.5},
    ),
    "ministral3": (
        {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 1.0}},
        TIED | WIDE_HEAD | {"sliding_window": 5, "vocab_size": 53} | {"rope_scaling": YARN | BETA},
    ),
    "granite": (
        TIED
        | {"embedding_multiplier": 3, "residual_multiplier": 0.3, "attention_multiplier": 0.2}
        | {"logits_scaling": 1.7, "attention_bias": True, "vocab_size": 53},
        {"head_dim": 12, "attention_multiplier": 0.3},
    ),
    "smollm3": (
        TIED | {"num_hidden_layers": 5, "vocab_size": 53},
        UNTIED | WIDE_HEAD | {"no_rope_layers": [0, 1], "attention_bias": True, "rope_theta": 100.0},
        UNTIED | {"no_rope_layer_interval": 2},
    ),
}
"""What of `PLAIN` each model of a family has otherwise; the first is a shape that GGUF can state."""

CASES = [(family, number) for family in ROWS for number in range(len(ROWS[family]))]


def odd_config(family: str, number: int) -> dict[str, Any]:
    """The ``config.json`` of a row."""
    return claims(Family(family)) | PLAIN | ROWS[family][number]
