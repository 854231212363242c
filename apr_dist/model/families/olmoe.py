"""OLMoE: Llama's block with q/k norms over all heads together, whose MLP is a mixture of experts."""

from apr_dist.model.families._definition import FamilyDefinition, GgufForm, only, read, sizes
from apr_dist.model.families._experts import EXPERTS_BLOCK, GGUF_KEYS, HF_KEYS, NAMES, OPTIONS
from apr_dist.model.families._gguf import QK_NORMS, TOP_LEVEL

FAMILY = FamilyDefinition(
    slug="olmoe",
    hf_architecture="OlmoeForCausalLM",
    hf_model_type="olmoe",
    named_like="qwen3_moe",
    hf_keys={
        **HF_KEYS,
        "num_experts": read("num_experts"),
        "norm_topk_prob": read("norm_topk_prob"),
        "attention_bias": read("attention_bias"),
        "clip_qkv": only(why="q, k and v are not clipped"),
    },
    hf_aliases={"num_local_experts": "num_experts"},
    hf_defaults={
        "vocab_size": 50_304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "attention_bias": False,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 50_279,
        "pad_token_id": 1,
    },
    gguf=GgufForm(
        architecture="olmoe",
        tensors={**TOP_LEVEL, **EXPERTS_BLOCK, **QK_NORMS},
        keys={**GGUF_KEYS, "expert_weights_norm": only(False, why="llama.cpp takes the weights as they are")},
        norms_routes=False,
    ),
    experts=NAMES,
    pre_tokenizers=("olmo", "gpt-2"),
    optional_attention_bias=True,
    qk_norm=True,
    qk_norm_whole=True,
    options=(*OPTIONS, "norm_topk_prob"),
    presets={
        "olmoe-1b-7b": sizes(
            *(50_304, 2048, 16, 16, 16, 128, 1024, 4096, 1e4, 1e-5, False),
            num_experts=64,
            num_experts_per_tok=8,
            router_aux_loss_coef=0.01,
        )
    },
)
