"""What the families have in common in a GGUF file: tensor names and metadata keys.

The names are those of the ``gguf`` package; what llama.cpp does with a key decides what becomes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from apr_dist.model.families._definition import Key, irrelevant, only, read

TOP_LEVEL: Final[Mapping[str, str]] = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
"""Tensors outside the blocks."""

TIED_TOP_LEVEL: Final[Mapping[str, str]] = {
    gguf: name for gguf, name in TOP_LEVEL.items() if name != "lm_head.weight"
}
"""Of architectures whose head llama.cpp knows as the embedding alone."""

BLOCK: Final[Mapping[str, str]] = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
"""What a block with norms before attention and MLP has."""

BLOCK_OF_BOTH_NORMS: Final[Mapping[str, str]] = {
    **BLOCK,
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}
"""What a block with norms before and after them has."""

BLOCK_OF_LATER_NORMS: Final[Mapping[str, str]] = {
    name: BLOCK_OF_BOTH_NORMS[name]
    for name in BLOCK_OF_BOTH_NORMS
    if name not in ("attn_norm.weight", "ffn_norm.weight")
}
"""What a block with norms after them has."""

QKV_BIASES: Final[Mapping[str, str]] = {
    f"attn_{name}.bias": f"self_attn.{name}_proj.bias" for name in ("q", "k", "v")
}
OUTPUT_BIAS: Final[Mapping[str, str]] = {"attn_output.bias": "self_attn.o_proj.bias"}
QK_NORMS: Final[Mapping[str, str]] = {
    f"attn_{name}_norm.weight": f"self_attn.{name}_norm.weight" for name in ("q", "k")
}

_SAME_HEAD = "must be the size of a head"
_NO_SCALE = "the decoder has no such factor"

KEYS: Final[Mapping[str, Key]] = {
    "block_count": read("num_layers"),
    "context_length": read("max_position_embeddings"),
    "embedding_length": read("hidden_size"),
    "feed_forward_length": read("intermediate_size"),
    "attention.head_count": read("num_heads"),
    "attention.head_count_kv": read("num_kv_heads"),
    "attention.key_length": read("head_dim"),
    "attention.value_length": read(why=_SAME_HEAD),
    "rope.dimension_count": read(why=_SAME_HEAD),
    "attention.layer_norm_rms_epsilon": read("rms_norm_eps"),
    "rope.freq_base": read("rope_theta"),
    "rope.scaling.type": read(why="part of rope_scaling"),
    "rope.scaling.factor": read(why="part of rope_scaling"),
    "rope.scale_linear": read(why="older name of rope.scaling.factor"),
    "rope.scaling.original_context_length": read(why="part of rope_scaling"),
    "rope.scaling.attn_factor": read(why="multiplies the attention factor of yarn"),
    "rope.scaling.yarn_attn_factor": read(why="the attention factor of yarn"),
    "rope.scaling.yarn_beta_fast": read(why="part of rope_scaling"),
    "rope.scaling.yarn_beta_slow": read(why="part of rope_scaling"),
    "rope.scaling.yarn_ext_factor": only(1.0, -1.0, why="yarn mixes in the extrapolation as a whole"),
    "rope.scaling.yarn_log_multiplier": only(0.0, why=_NO_SCALE),
    "rope.scaling.alpha": only(0.0, why="dynamic NTK scaling is not computed"),
    "rope.scaling.finetuned": irrelevant("whether training went on after scaling"),
    "vocab_size": irrelevant("the rows of the embedding are counted"),
    "tensor_data_layout": irrelevant("rows lie as llama.cpp reads them, whatever it says"),
    "expert_count": only(0, why="a dense decoder has no experts"),
    "expert_used_count": only(0, why="a dense decoder has no experts"),
    "attention.causal": only(True, why="attention is causal"),
    "attention.scale": only(0.0, why="scores are divided by the root of the head's size"),
    "attention.clamp_kqv": only(0.0, why=_NO_SCALE),
    "attention.max_alibi_bias": only(0.0, why="positions are rotated"),
    "attention.layer_norm_epsilon": irrelevant("of LayerNorm, which these families do not have"),
    "attention.sliding_window": only(0, why="llama.cpp gives this architecture no window"),
    "logit_scale": only(0.0, 1.0, why=_NO_SCALE),
    "residual_scale": only(0.0, 1.0, why=_NO_SCALE),
    "embedding_scale": only(0.0, 1.0, why=_NO_SCALE),
    "attn_logit_softcapping": only(0.0, why=_NO_SCALE),
    "final_logit_softcapping": only(0.0, why=_NO_SCALE),
    "use_parallel_residual": only(False, why="attention and MLP follow one another"),
    "pooling_type": only(0, why="a language model pools nothing"),
}
"""What becomes of each key, without the architecture's prefix, of every family."""

TOKENIZER_KEYS: Final[Mapping[str, Key]] = {
    "ggml.model": read(why="kind of tokenizer"),
    "ggml.pre": read(why="how text is cut"),
    "ggml.tokens": read(why="tokens by id"),
    "ggml.token_type": read(why="which tokens are special"),
    "ggml.scores": read(why="order of merges of a SentencePiece vocabulary"),
    "ggml.merges": read(why="merges"),
    "ggml.bos_token_id": read(why="beginning of a text"),
    "ggml.eos_token_id": read(why="end of a text"),
    "ggml.eot_token_id": read(why="end of a turn, where generation stops"),
    "ggml.eom_token_id": read(why="end of a message, where generation stops"),
    "ggml.unknown_token_id": read(why="unknown token"),
    "ggml.padding_token_id": read(why="padding"),
    "ggml.add_bos_token": read(why="whether texts begin with the beginning token"),
    "ggml.add_eos_token": read(why="whether texts end with the end token"),
    "ggml.add_space_prefix": read(why="whether texts begin with a space"),
    "ggml.add_sep_token": only(False, why="texts end without a separator"),
    "ggml.remove_extra_whitespaces": only(False, why="white space is text"),
    "ggml.token_type_count": irrelevant("of BERT's segments"),
    "ggml.seperator_token_id": irrelevant("of pairs of texts"),
    "ggml.cls_token_id": irrelevant("of classification"),
    "ggml.mask_token_id": irrelevant("of masked models"),
    **{
        f"ggml.{name}_token_id": irrelevant("marks text to be filled in; a prompt of its own")
        for name in ("fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep", "prefix", "suffix")
    },
    "ggml.middle_token_id": irrelevant("marks text to be filled in; a prompt of its own"),
    "chat_template": read("chat_template"),
    "chat_templates": irrelevant("names of further chat templates"),
    "huggingface.json": irrelevant("a copy of the tokenizer.json; the fields above are read"),
}
"""What becomes of each key after ``tokenizer.``; ``chat_template.NAME`` is a further template."""
