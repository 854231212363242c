"""Qwen3, dense: Llama's block with an RMSNorm on each head of q and k, and a head size of its own."""

from apr_dist.model.families._definition import FamilyDefinition, GgufForm, read, sizes
from apr_dist.model.families._gguf import BLOCK, OUTPUT_BIAS, QK_NORMS, QKV_BIASES, TOP_LEVEL
from apr_dist.model.families._huggingface import WINDOW_KEYS

_NORM = r"model\.layers\.[^\n]*self_attn\.q_norm\.weight"
_BIASES = (r"model\.layers\.[^\n]*self_attn\.q_proj\.bias", r"self_attn\.o_proj\.bias")


FAMILY = FamilyDefinition(
    slug="qwen3",
    hf_architecture="Qwen3ForCausalLM",
    hf_model_type="qwen3",
    tensor_marks=((_NORM, r"model\.layers\."), (_NORM, r"model\.layers\.", *_BIASES)),
    hf_keys={**WINDOW_KEYS, "attention_bias": read("attention_bias")},
    hf_defaults={
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 22_016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    gguf=GgufForm(
        architecture="qwen3", tensors={**TOP_LEVEL, **BLOCK, **QK_NORMS, **QKV_BIASES, **OUTPUT_BIAS}
    ),
    pre_tokenizers=("qwen2",),
    optional_attention_bias=True,
    qk_norm=True,
    head_dim_stated=True,
    presets={
        "qwen3-0.6b": sizes(151_936, 1024, 28, 16, 8, 128, 3072, 40_960, 1e6, 1e-6, True),
        "qwen3-4b": sizes(151_936, 2560, 36, 32, 8, 128, 9728, 40_960, 1e6, 1e-6, True),
        "qwen3-8b": sizes(151_936, 4096, 36, 32, 8, 128, 12_288, 40_960, 1e6, 1e-6, False),
    },
)
