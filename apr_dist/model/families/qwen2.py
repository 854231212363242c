"""Qwen2 and Qwen2.5, the Coder models included: Llama's block with biases on q, k and v."""

from apr_dist.model.families._definition import FamilyDefinition, GgufForm, irrelevant, sizes
from apr_dist.model.families._gguf import BLOCK, QKV_BIASES, TOP_LEVEL
from apr_dist.model.families._huggingface import WINDOW_KEYS

_HALF_B = sizes(151_936, 896, 24, 14, 2, 64, 4864, 32_768, 1e6, 1e-6, True)
_ONE_AND_A_HALF_B = sizes(151_936, 1536, 28, 12, 2, 128, 8960, 32_768, 1e6, 1e-6, True)
_SEVEN_B = sizes(152_064, 3584, 28, 28, 4, 128, 18_944, 131_072, 1e6, 1e-6, False)

FAMILY = FamilyDefinition(
    slug="qwen2",
    hf_architecture="Qwen2ForCausalLM",
    hf_model_type="qwen2",
    claims=("Qwen2.5ForCausalLM", "qwen2.5", "qwen"),
    tensor_marks=(
        (r"model\.layers\.[^\n]*self_attn\.q_proj\.weight", r"model\.layers\.[^\n]*self_attn\.q_proj\.bias"),
        (r"model\.layers\.[^\n]*self_attn\.q_proj\.bias",),
        (r"model\.layers\.[^\n]*qkv_proj\.weight",),
    ),
    hf_keys={**WINDOW_KEYS, "attention_bias": irrelevant("q, k and v always have biases, o never")},
    hf_defaults={
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 22_016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": None,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    gguf=GgufForm(architecture="qwen2", tensors={**TOP_LEVEL, **BLOCK, **QKV_BIASES}),
    pre_tokenizers=("qwen2",),
    qkv_bias=True,
    presets={
        "qwen2.5-0.5b": _HALF_B,
        "qwen2.5-coder-0.5b": _HALF_B,
        "qwen2.5-1.5b": _ONE_AND_A_HALF_B,
        "qwen2.5-coder-1.5b": _ONE_AND_A_HALF_B,
        "qwen2.5-3b": sizes(151_936, 2048, 36, 16, 2, 128, 11_008, 32_768, 1e6, 1e-6, True),
        "qwen2.5-7b": _SEVEN_B,
        "qwen2.5-coder-7b": _SEVEN_B | {"max_position_embeddings": 32_768},
    },
)
