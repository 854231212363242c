"""Ministral 3, its text models: Mistral's block with YaRN and queries scaled by their position."""

from apr_dist.model.families._definition import FamilyDefinition, GgufForm, read, sizes
from apr_dist.model.families._gguf import BLOCK, TOP_LEVEL
from apr_dist.model.rope_scaling import RopeScaling, RopeScalingType

_BETA = "llama_4_scaling_beta"
_YARN = RopeScaling(
    rope_type=RopeScalingType.YARN,
    factor=16.0,
    original_max_position_embeddings=16_384,
    attention_factor=1.0,
)

FAMILY = FamilyDefinition(
    slug="ministral3",
    hf_architecture="Ministral3ForCausalLM",
    hf_model_type="ministral3",
    named_like="llama",
    hf_keys={"sliding_window": read("sliding_window")},
    hf_defaults={
        "vocab_size": 131_072,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 34,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262_144,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 11,
    },
    gguf=GgufForm(
        architecture="mistral3",
        tensors={**TOP_LEVEL, **BLOCK},
        permuted=True,
        keys={
            "attention.temperature_scale": read(_BETA),
            "rope.scaling.yarn_log_multiplier": read(why="part of the attention factor of yarn"),
        },
    ),
    pre_tokenizers=("tekken",),
    sliding_window=True,
    rope_scalings=(RopeScalingType.YARN,),
    rope_default={
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 16_384,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        _BETA: 0.1,
    },
    options=(_BETA,),
    presets={
        "ministral-3-8b": sizes(
            *(131_072, 4096, 34, 32, 8, 128, 14_336, 262_144, 1e6, 1e-5, False),
            rope_scaling=_YARN,
            llama_4_scaling_beta=0.1,
        )
    },
)
