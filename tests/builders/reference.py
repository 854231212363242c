"""The same model in ``transformers``, to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from apr_dist.model.config import TransformerConfig
from apr_dist.model.families import Family
from apr_dist.model.transformer import Decoder


def as_stored(config: TransformerConfig, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by their names in ``transformers``: in Phi-3 rows of several of ours are one."""
    joins = {".q_proj.": ".qkv_proj.", ".k_proj.": ".qkv_proj.", ".v_proj.": ".qkv_proj."}
    joins |= {".gate_proj.": ".gate_up_proj.", ".up_proj.": ".gate_up_proj."}
    stored: dict[str, torch.Tensor] = {}
    for name, value in values.items():
        part = next((one for one in joins if one in name), None) if config.family is Family.PHI3 else None
        whole = name if part is None else name.replace(part, joins[part])
        stored[whole] = torch.cat((stored[whole], value)) if whole in stored else value
    return stored


def reference_model(ours: Decoder) -> Any:
    """The class of the same family in ``transformers`` with the same weights, eager attention."""
    transformers = pytest.importorskip("transformers")
    config = ours.config
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        rope = config.rope_scaling.to_mapping()
    rope |= {"rope_theta": config.rope_theta}
    extra: dict[str, Any] = config.set_options()
    if (local := extra.pop("rope_local_theta", None)) is not None:
        near = {"rope_type": "default", "rope_theta": local}
        rope = {"full_attention": rope, "sliding_attention": near}
    rope |= {key: extra.pop(key) for key in ("partial_rotary_factor", "llama_4_scaling_beta") if key in extra}
    if (scaling := config.rope_scaling) and config.family is Family.PHI3:  # read beside the scaling alone
        extra["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if config.family.definition.sliding_window:
        extra["sliding_window"] = config.sliding_window
    if config.attention_bias:
        extra["attention_bias"] = True
    settings = transformers.AutoConfig.for_model(
        config.family.hf_model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=config.tie_word_embeddings,
        attn_implementation="eager",
        pad_token_id=None,  # the gradient of its row would be left out
        **extra,
    )
    model = getattr(transformers, config.family.hf_architecture)(settings)
    loaded = model.load_state_dict(as_stored(config, ours.state_dict()), strict=False)
    assert loaded.missing_keys == (["lm_head.weight"] if config.tie_word_embeddings else [])
    assert loaded.unexpected_keys == []
    model.tie_weights()
    return model.eval()
