"""Granite 3: Llama's block with multipliers on embeddings, scores, residual stream and logits."""

from apr_dist.model.families._definition import FamilyDefinition, GgufForm, read, sizes
from apr_dist.model.families._gguf import BLOCK, OUTPUT_BIAS, QKV_BIASES, TOP_LEVEL

_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")

FAMILY = FamilyDefinition(
    slug="granite",
    hf_architecture="GraniteForCausalLM",
    hf_model_type="granite",
    named_like="llama",
    hf_keys={"attention_bias": read("attention_bias"), **{key: read(key) for key in _MULTIPLIERS}},
    hf_defaults={
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "attention_bias": False,
        **dict.fromkeys(_MULTIPLIERS, 1.0),
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    gguf=GgufForm(
        architecture="granite",
        tensors={**TOP_LEVEL, **BLOCK, **QKV_BIASES, **OUTPUT_BIAS},
        permuted=True,
        rope_factors=True,
        # By zero or without a key llama.cpp scales scores by the head's size, and the rest by nothing.
        keys={
            "embedding_scale": read("embedding_multiplier"),
            "residual_scale": read("residual_multiplier"),
            "attention.scale": read("attention_multiplier"),
            "logit_scale": read("logits_scaling"),
        },
    ),
    pre_tokenizers=("refact", "llama-bpe"),
    optional_attention_bias=True,
    options=_MULTIPLIERS,
    presets={
        "granite-3.3-2b": sizes(
            *(49_159, 2048, 40, 32, 8, 64, 8192, 131_072, 1e7, 1e-5, True),
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            attention_multiplier=0.015625,
            logits_scaling=8.0,
        )
    },
)
