"""Qwen3, dense: Llama's block with an RMSNorm on each head of q and k, and a head size of its own."""

from typing import Any

from apr_dist.model.families._definition import FamilyDefinition, GgufForm, read
from apr_dist.model.families._gguf import BLOCK, OUTPUT_BIAS, QK_NORMS, QKV_BIASES, TOP_LEVEL
from apr_dist.model.families._huggingface import WINDOW_KEYS

_NORM = r"model\.layers\.[^\n]*self_attn\.q_norm\.weight"
_BIASES = (r"model\.layers\.[^\n]*self_attn\.q_proj\.bias", r"self_attn\.o_proj\.bias")


def _size(hidden: int, layers: int, heads: int, inner: int) -> dict[str, Any]:
    return {
        "vocab_size": 151_936,
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": 8,
        "head_dim": 128,
        "intermediate_size": inner,
        "max_position_embeddings": 40_960,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }


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
        "qwen3-0.6b": _size(1024, 28, 16, 3072),
        "qwen3-4b": _size(2560, 36, 32, 9728),
        "qwen3-8b": {**_size(4096, 36, 32, 12_288), "tie_word_embeddings": False},
    },
)
