"""Qwen3-MoE: Qwen3's block, whose MLP is a mixture of experts."""

from apr_dist.model.families._definition import FamilyDefinition, GgufForm, only, read, sizes
from apr_dist.model.families._experts import EXPERTS_BLOCK, GGUF_KEYS, HF_KEYS, NAMES, OPTIONS
from apr_dist.model.families._gguf import QK_NORMS, TOP_LEVEL
from apr_dist.model.families._huggingface import WINDOW_KEYS

_MARKS = (
    r"model\.layers\.[^\n]*self_attn\.q_norm\.weight",
    r"model\.layers\.",
    r"mlp\.experts\.(gate_up_proj|\d+\.gate_proj)",
)
_BIASES = (r"model\.layers\.[^\n]*self_attn\.q_proj\.bias", r"self_attn\.o_proj\.bias")
_NO_DENSE = "every block has experts"

FAMILY = FamilyDefinition(
    slug="qwen3_moe",
    hf_architecture="Qwen3MoeForCausalLM",
    hf_model_type="qwen3_moe",
    tensor_marks=(_MARKS, (*_MARKS, *_BIASES)),
    hf_keys={
        **WINDOW_KEYS,
        **HF_KEYS,
        "num_experts": read("num_experts"),
        "moe_intermediate_size": read("moe_intermediate_size"),
        "norm_topk_prob": read("norm_topk_prob"),
        "attention_bias": read("attention_bias"),
        "decoder_sparse_step": only(1, why=_NO_DENSE),
        "mlp_only_layers": only([], why=_NO_DENSE),
    },
    hf_aliases={"num_local_experts": "num_experts"},
    hf_defaults={
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": None,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "attention_bias": False,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    gguf=GgufForm(
        architecture="qwen3moe",
        tensors={**TOP_LEVEL, **EXPERTS_BLOCK, **QK_NORMS},
        keys={
            **GGUF_KEYS,
            "expert_feed_forward_length": read("moe_intermediate_size"),
            "expert_weights_norm": only(True, why="llama.cpp divides the weights by their sum"),
        },
        norms_routes=True,
    ),
    experts=NAMES,
    pre_tokenizers=("qwen2",),
    optional_attention_bias=True,
    qk_norm=True,
    options=(*OPTIONS, "moe_intermediate_size", "norm_topk_prob"),
    presets={
        "qwen3-30b-a3b": sizes(
            *(151_936, 2048, 48, 32, 4, 128, 6144, 40_960, 1e6, 1e-6, False),
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            norm_topk_prob=True,
            router_aux_loss_coef=0.001,
        )
    },
)
