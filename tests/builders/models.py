"""Tiny decoders of every family, and random weights for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from apr_dist.model.config import TransformerConfig
from apr_dist.model.families import FULL_ATTENTION, Family, layer_kinds
from apr_dist.model.rope_scaling import RopeScaling, RopeScalingType
from apr_dist.model.transformer import Decoder

OPTIONS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 16},
    "gemma2": {
        "sliding_window": 5,
        "layer_types": layer_kinds(2, 2),
        "query_pre_attn_scalar": 5,
        "attn_logit_softcapping": 0.7,
        "final_logit_softcapping": 1.5,
    },
    "gemma3": {
        "sliding_window": 5,
        "layer_types": layer_kinds(2, 2),
        "rope_local_theta": 100.0,
        "query_pre_attn_scalar": 5,
        "final_logit_softcapping": 1.5,
        "head_dim": 16,
    },
    "olmo3": {"sliding_window": 5, "layer_types": layer_kinds(2, 2), "rope_local_theta": 100.0},
    "granite": {
        "embedding_multiplier": 0.5,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.2,
        "logits_scaling": 1.7,
    },
    "smollm3": {"no_rope_layers": (1, 0)},
    "phi3": {
        "partial_rotary_factor": 0.75,
        "sliding_window": 9,
        "rope_scaling": RopeScaling(
            rope_type=RopeScalingType.LONGROPE,
            factor=4.0,
            original_max_position_embeddings=16,
            short_factor=(1.0, 1.1, 1.3),
            long_factor=(1.5, 2.5, 4.5),
        ),
    },
    "ministral3": {
        "llama_4_scaling_beta": 0.3,
        "rope_scaling": RopeScaling(
            rope_type=RopeScalingType.YARN, factor=4.0, original_max_position_embeddings=8
        ),
    },
}
"""What a tiny model of a family has that others have not: nothing of it is neutral."""


def tiny_config(family: Family = Family.LLAMA, **changes: Any) -> TransformerConfig:
    """Two layers, hidden 32, 4 heads on 2 KV heads, vocabulary 97, tied; ``changes`` replace fields."""
    fields: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    fields |= OPTIONS.get(family, {}) | changes
    for name, entry in (("layer_types", FULL_ATTENTION), ("no_rope_layers", 1)):
        if name in fields and name not in changes:  # as many as there are layers
            fields[name] = (*fields[name], *(entry,) * fields["num_layers"])[: fields["num_layers"]]
    return TransformerConfig(family=family, **fields)


def random_weights(config: TransformerConfig, *, seed: int = 0) -> dict[str, np.ndarray]:
    """f32 values for every parameter, none of them special: norms are not one, biases not zero."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in config.parameter_shapes().items():
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.1)
        weights[name] = values + np.float32(1.0) if name.endswith("norm.weight") else values
    return weights


def tiny_decoder(config: TransformerConfig | None = None, *, seed: int = 0) -> Decoder:
    """A decoder on the CPU with `random_weights`."""
    config = config or tiny_config()
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device="cpu")
    model.reset_buffers()
    weights = random_weights(config, seed=seed)
    model.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()})
    return model


def random_tokens(config: TransformerConfig, shape: tuple[int, ...], *, seed: int = 0) -> torch.Tensor:
    """Uniform int64 token ids below the vocabulary."""
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
