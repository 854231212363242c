"""OLMo 2: Llama's block with norms after attention and MLP, and q/k norms over all heads together."""

from apr_dist.model.families._definition import FamilyDefinition, GgufForm, Norms, sizes
from apr_dist.model.families._gguf import BLOCK_OF_LATER_NORMS, QK_NORMS, TOP_LEVEL

FAMILY = FamilyDefinition(
    slug="olmo2",
    hf_architecture="Olmo2ForCausalLM",
    hf_model_type="olmo2",
    tensor_marks=(
        (
            r"model\.layers\.[^\n]*self_attn\.q_norm\.weight",
            r"model\.layers\.[^\n]*self_attn\.q_proj\.weight",
            r"post_feedforward_layernorm\.weight",
        ),
    ),
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
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 50_279,
        "pad_token_id": 1,
    },
    gguf=GgufForm(
        architecture="olmo2",
        tensors={**TOP_LEVEL, **BLOCK_OF_LATER_NORMS, **QK_NORMS},
        even_heads=True,
        own_head=True,
    ),
    pre_tokenizers=("dbrx", "olmo", "gpt-2"),
    norms=Norms.AFTER,
    qk_norm=True,
    qk_norm_whole=True,
    presets={
        "olmo-2-1b": sizes(100_352, 2048, 16, 16, 16, 128, 8192, 4096, 5e5, 1e-6, False),
        "olmo-2-7b": sizes(100_352, 4096, 32, 32, 32, 128, 11_008, 4096, 5e5, 1e-6, False),
    },
)
