"""The same model in ``transformers``, to compare with."""

from __future__ import annotations

from typing import Any

import pytest

from apr_dist.model.transformer import Decoder


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
    loaded = model.load_state_dict(ours.state_dict(), strict=False)
    assert loaded.missing_keys == (["lm_head.weight"] if config.tie_word_embeddings else [])
    assert loaded.unexpected_keys == []
    model.tie_weights()
    return model.eval()
