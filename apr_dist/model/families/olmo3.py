"""OLMo 3: OLMo 2's block; three of four layers see a window, and no scaling of RoPE reaches these."""

from apr_dist.model.families._definition import FamilyDefinition, GgufForm, Norms, layer_kinds, read, sizes
from apr_dist.model.families._gguf import BLOCK_OF_LATER_NORMS, QK_NORMS, TOP_LEVEL
from apr_dist.model.rope_scaling import RopeScaling, RopeScalingType

_YARN = RopeScaling(
    rope_type=RopeScalingType.YARN,
    factor=8.0,
    original_max_position_embeddings=8192,
    attention_factor=1.2079441541679836,
)

FAMILY = FamilyDefinition(
    slug="olmo3",
    hf_architecture="Olmo3ForCausalLM",
    hf_model_type="olmo3",
    named_like="olmo2",
    hf_keys={"sliding_window": read("sliding_window"), "layer_types": read("layer_types")},
    hf_defaults={
        "vocab_size": 50_304,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "sliding_window": 4096,
        "layer_types": None,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 50_279,
        "pad_token_id": 1,
    },
    # llama.cpp computes it as OLMo 2 with a window, whose layers rotate by the same base as the others.
    gguf=GgufForm(
        architecture="olmo2",
        tensors={**TOP_LEVEL, **BLOCK_OF_LATER_NORMS, **QK_NORMS},
        even_heads=True,
        own_head=True,
        stated_by="attention.sliding_window",
        keys={
            "attention.sliding_window": read("sliding_window"),
            "attention.sliding_window_pattern": read(why="which layers have a window"),
        },
    ),
    pre_tokenizers=("dbrx", "olmo", "gpt-2"),
    norms=Norms.AFTER,
    qk_norm=True,
    qk_norm_whole=True,
    sliding_window=True,
    full_every=4,
    local_rope=True,
    options=("layer_types", "rope_local_theta"),
    presets={
        "olmo-3-7b": sizes(
            *(100_278, 4096, 32, 32, 32, 128, 11_008, 65_536, 5e5, 1e-6, False),
            sliding_window=4096,
            layer_types=layer_kinds(32, 4),
            rope_local_theta=5e5,
            rope_scaling=_YARN,
        )
    },
)
