"""Mixtral: Mistral's block, whose MLP is a mixture of experts with weights that sum to one."""

from apr_dist.model.families._definition import ExpertNames, FamilyDefinition, GgufForm, only, read, sizes
from apr_dist.model.families._experts import EXPERTS_BLOCK, GGUF_KEYS, HF_KEYS, OPTIONS, ROUTER_JITTER
from apr_dist.model.families._gguf import TOP_LEVEL

FAMILY = FamilyDefinition(
    slug="mixtral",
    hf_architecture="MixtralForCausalLM",
    hf_model_type="mixtral",
    tensor_marks=(
        (
            r"block_sparse_moe\.experts\.|mlp\.experts\.gate_up_proj",
            r"model\.layers\.[^\n]*self_attn\.q_proj\.weight",
        ),
    ),
    hf_keys={
        **HF_KEYS,
        "num_local_experts": read("num_experts"),
        "router_jitter_noise": ROUTER_JITTER,
        "sliding_window": read("sliding_window"),
    },
    hf_aliases={"num_experts": "num_local_experts"},
    hf_defaults={
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    gguf=GgufForm(
        architecture="llama",
        tensors={**TOP_LEVEL, **EXPERTS_BLOCK},
        permuted=True,
        rope_factors=True,
        stated_by="expert_count",
        keys={
            **GGUF_KEYS,
            "expert_weights_norm": only(True, why="llama.cpp divides the weights by their sum"),
        },
        norms_routes=True,
    ),
    experts=ExpertNames(
        gate="w1.weight", up="w3.weight", down="w2.weight", router="block_sparse_moe.gate.weight"
    ),
    pre_tokenizers=("llama-bpe",),
    sliding_window=True,
    normed_routes=True,
    options=OPTIONS,
    presets={
        "mixtral-8x7b": sizes(
            *(32_000, 4096, 32, 32, 8, 128, 14_336, 32_768, 1e6, 1e-5, False),
            num_experts=8,
            num_experts_per_tok=2,
            router_aux_loss_coef=0.02,
        )
    },
)
