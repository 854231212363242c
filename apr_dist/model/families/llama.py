"""Llama 1 to 3, and what has its shape (SmolLM2, TinyLlama, and others of the model type llama)."""

from apr_dist.model.families._definition import FamilyDefinition, GgufForm, read, sizes
from apr_dist.model.families._gguf import BLOCK, OUTPUT_BIAS, QKV_BIASES, TOP_LEVEL

_WEIGHTS = r"model\.layers\.[^\n]*(self_attn\.q_proj|mlp\.gate_proj)\.weight"

FAMILY = FamilyDefinition(
    slug="llama",
    hf_architecture="LlamaForCausalLM",
    hf_model_type="llama",
    tensor_marks=(
        (_WEIGHTS,),
        (
            r"mlp\.gate_proj\.weight",
            r"model\.layers\.[^\n]*self_attn\.q_proj\.bias",
            r"self_attn\.o_proj\.bias",
        ),
    ),
    hf_keys={"attention_bias": read("attention_bias")},
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
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    gguf=GgufForm(
        architecture="llama",
        tensors={**TOP_LEVEL, **BLOCK, **QKV_BIASES, **OUTPUT_BIAS},
        permuted=True,
        rope_factors=True,
    ),
    pre_tokenizers=("llama-bpe", "smollm"),
    optional_attention_bias=True,
    presets={
        "llama-370m": sizes(50_257, 1024, 24, 16, 4, 64, 2816, 4096, 1e4, 1e-5, True),
        "smollm2-135m": sizes(49_152, 576, 30, 9, 3, 64, 1536, 8192, 1e5, 1e-5, True),
        "llama-2-7b": sizes(32_000, 4096, 32, 32, 32, 128, 11_008, 4096, 1e4, 1e-5, False),
    },
)
