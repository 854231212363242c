"""Gemma 3, its text models: Gemma 2's block with q/k norms, and a RoPE base for layers with a window."""

from apr_dist.model.families._definition import (
    Activation,
    FamilyDefinition,
    GgufForm,
    Norms,
    layer_kinds,
    only,
    read,
    sizes,
)
from apr_dist.model.families._gguf import BLOCK_OF_BOTH_NORMS, QK_NORMS, TOP_LEVEL
from apr_dist.model.families._huggingface import GEMMA_KEYS


def _published(layers: int, *values: int, window: int) -> dict[str, object]:
    """A published size: hidden size, heads, KV heads, inner size of the MLP."""
    hidden, heads, kv_heads, inner = values
    return sizes(
        *(262_144, hidden, layers, heads, kv_heads, 256, inner, 32_768, 1e6, 1e-6, True),
        sliding_window=window,
        layer_types=layer_kinds(layers, 6),
        query_pre_attn_scalar=256,
        rope_local_theta=1e4,
    )


FAMILY = FamilyDefinition(
    slug="gemma3",
    hf_architecture="Gemma3ForCausalLM",
    hf_model_type="gemma3_text",
    tensor_marks=(
        (
            r"model\.layers\.[^\n]*self_attn\.q_norm\.weight",
            r"model\.layers\.[^\n]*self_attn\.q_proj\.weight",
            r"pre_feedforward_layernorm\.weight",
            r"post_feedforward_layernorm\.weight",
        ),
    ),
    hf_keys={
        **GEMMA_KEYS,
        "attn_logit_softcapping": only(why="this family's scores have no cap"),
        "sliding_window_pattern": read(why="gives layer_types, where these are not listed"),
        "rope_local_base_freq": read("rope_local_theta"),
    },
    hf_defaults={
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
        "final_logit_softcapping": None,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
    gguf=GgufForm(
        architecture="gemma3",
        tensors={**TOP_LEVEL, **BLOCK_OF_BOTH_NORMS, **QK_NORMS},
        norm_shift=1.0,
        absent={"rope_local_theta": 1e4, "rope_theta": 1e6},
        wide_queries_at=62,
        keys={
            "attention.sliding_window": read("sliding_window"),
            "rope.freq_base_swa": read("rope_local_theta"),
            "final_logit_softcapping": read("final_logit_softcapping"),
        },
    ),
    qk_norm=True,
    norms=Norms.BOTH,
    one_plus_norms=True,
    activation=Activation.GELU_TANH,
    root_embedding=True,
    sliding_window=True,
    full_every=6,
    local_rope=True,
    options=("layer_types", "rope_local_theta", "query_pre_attn_scalar", "final_logit_softcapping"),
    head_dim_stated=True,
    presets={
        "gemma-3-270m": _published(18, 640, 4, 1, 2048, window=512),
        "gemma-3-1b": _published(26, 1152, 4, 1, 6912, window=512),
    },
)
