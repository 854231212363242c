"""Mistral 7B: Llama's block, whose attention may be limited to a window over all layers."""

from apr_dist.model.families._definition import FamilyDefinition, GgufForm, read, sizes
from apr_dist.model.families._gguf import BLOCK, TOP_LEVEL

FAMILY = FamilyDefinition(
    slug="mistral",
    hf_architecture="MistralForCausalLM",
    hf_model_type="mistral",
    named_like="llama",
    hf_keys={"sliding_window": read("sliding_window")},
    hf_defaults={
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    # llama.cpp has no architecture of its own for it; such a file is read as Llama.
    gguf=GgufForm(
        architecture="llama", tensors={**TOP_LEVEL, **BLOCK}, imported=False, permuted=True, rope_factors=True
    ),
    pre_tokenizers=("tekken", "llama-bpe"),
    sliding_window=True,
    presets={
        "mistral-7b": sizes(
            *(32_000, 4096, 32, 32, 8, 128, 14_336, 32_768, 1e4, 1e-5, False), sliding_window=4096
        )
    },
)
