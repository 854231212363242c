"""Gemma 2: norms before and after attention and MLP, soft caps, every second layer through a window."""

from apr_dist.model.families._definition import (
    Activation,
    FamilyDefinition,
    GgufForm,
    Norms,
    layer_kinds,
    read,
    sizes,
)
from apr_dist.model.families._gguf import BLOCK_OF_BOTH_NORMS, TIED_TOP_LEVEL
from apr_dist.model.families._huggingface import GEMMA_KEYS

_PROJECTION = r"model\.layers\.[^\n]*self_attn\.q_proj\.weight"
_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def _published(layers: int, *values: int, scalar: float) -> dict[str, object]:
    """A published size: hidden size, heads, KV heads, size of a head, inner size of the MLP."""
    hidden, heads, kv_heads, head, inner = values
    return sizes(
        *(256_000, hidden, layers, heads, kv_heads, head, inner, 8192, 1e4, 1e-6, True),
        sliding_window=4096,
        layer_types=layer_kinds(layers, 2),
        query_pre_attn_scalar=scalar,
        **_CAPS,
    )


FAMILY = FamilyDefinition(
    slug="gemma2",
    hf_architecture="Gemma2ForCausalLM",
    hf_model_type="gemma2",
    tensor_marks=((_PROJECTION, r"pre_feedforward_layernorm\.weight"),),
    hf_keys={
        **GEMMA_KEYS,
        "attn_logit_softcapping": read("attn_logit_softcapping"),
    },
    hf_defaults={
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
        **_CAPS,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
    gguf=GgufForm(
        architecture="gemma2",
        tensors={**TIED_TOP_LEVEL, **BLOCK_OF_BOTH_NORMS},
        norm_shift=1.0,
        absent={"sliding_window": 4096, **_CAPS},
        wide_queries_at=46,
        keys={
            "attention.sliding_window": read("sliding_window"),
            "attn_logit_softcapping": read("attn_logit_softcapping"),
            "final_logit_softcapping": read("final_logit_softcapping"),
        },
    ),
    norms=Norms.BOTH,
    one_plus_norms=True,
    activation=Activation.GELU_TANH,
    root_embedding=True,
    sliding_window=True,
    full_every=2,
    options=("layer_types", "query_pre_attn_scalar", *_CAPS),
    head_dim_stated=True,
    presets={
        "gemma-2-2b": _published(26, 2304, 8, 4, 256, 9216, scalar=256),
        "gemma-2-9b": _published(42, 3584, 16, 8, 256, 14_336, scalar=256),
        "gemma-2-27b": _published(46, 4608, 32, 16, 128, 36_864, scalar=144),
    },
)
