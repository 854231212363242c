"""Phi-3, Phi-3.5 and Phi-4 (mini too): Llama's block, rotated in part, with joined projections in files."""

from apr_dist.model.families._definition import FamilyDefinition, GgufForm, left_out, only, read, sizes
from apr_dist.model.families._gguf import TOP_LEVEL
from apr_dist.model.rope_scaling import RopeScalingType

_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_qkv.weight": "self_attn.qkv_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_up.weight": "mlp.gate_up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_NO_DROPOUT = left_out("training applies no dropout", unless=(0.0,))

FAMILY = FamilyDefinition(
    slug="phi3",
    hf_architecture="Phi3ForCausalLM",
    hf_model_type="phi3",
    named_like="llama",
    hf_keys={
        "sliding_window": read("sliding_window"),
        "partial_rotary_factor": read("partial_rotary_factor"),
        "resid_pdrop": _NO_DROPOUT,
        "embd_pdrop": _NO_DROPOUT,
        "lm_head_bias": only(False, why="the head has none"),
        "full_attn_mod": only(1, why="all layers attend alike"),
        "interpolate_factor": only(1, why="positions are whole numbers"),
    },
    hf_defaults={
        "vocab_size": 32_064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 32_000,
        "pad_token_id": 32_000,
    },
    # llama.cpp attends to all positions whatever window a file states.
    gguf=GgufForm(
        architecture="phi3",
        tensors={**TOP_LEVEL, **_BLOCK},
        long_factors=True,
        even_heads=True,
        keys={"attention.sliding_window": read("sliding_window")},
    ),
    pre_tokenizers=("gpt-4o", "dbrx"),
    sliding_window=True,
    rope_scalings=(RopeScalingType.LONGROPE,),
    rope_aliases={"su": "longrope", "yarn": "longrope"},
    joined={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
    options=("partial_rotary_factor",),
    presets={
        "phi-3-mini-4k": sizes(
            *(32_064, 3072, 32, 32, 32, 96, 8192, 4096, 1e4, 1e-5, False), sliding_window=2047
        ),
        "phi-4": sizes(100_352, 5120, 40, 40, 10, 128, 17_920, 16_384, 2.5e5, 1e-5, False),
    },
)
