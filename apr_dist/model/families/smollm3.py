"""SmolLM3: Llama's block, of which every fourth layer rotates nothing."""

from apr_dist.model.families._definition import FamilyDefinition, GgufForm, read, rope_layers, sizes
from apr_dist.model.families._gguf import BLOCK, OUTPUT_BIAS, QKV_BIASES, TOP_LEVEL
from apr_dist.model.families._huggingface import WINDOW_KEYS

FAMILY = FamilyDefinition(
    slug="smollm3",
    hf_architecture="SmolLM3ForCausalLM",
    hf_model_type="smollm3",
    named_like="llama",
    hf_keys={
        **WINDOW_KEYS,
        "attention_bias": read("attention_bias"),
        "no_rope_layers": read("no_rope_layers"),
        "no_rope_layer_interval": read(why="gives no_rope_layers, where these are not listed"),
    },
    hf_defaults={
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": None,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 2e6,
        "attention_bias": False,
        "no_rope_layers": None,
        "tie_word_embeddings": True,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
        "pad_token_id": 128_004,
    },
    gguf=GgufForm(
        architecture="smollm3",
        tensors={**TOP_LEVEL, **BLOCK, **QKV_BIASES, **OUTPUT_BIAS},
        permuted=True,
        rope_factors=True,
    ),
    pre_tokenizers=("smaug-bpe", "llama-bpe"),
    optional_attention_bias=True,
    no_rope_every=4,
    options=("no_rope_layers",),
    presets={
        "smollm3-3b": sizes(
            *(128_256, 2048, 36, 16, 4, 128, 11_008, 65_536, 5e6, 1e-6, True),
            no_rope_layers=rope_layers(36, 4),
        )
    },
)
