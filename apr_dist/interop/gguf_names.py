"""What GGUF's names mean in Hugging Face's terms, both ways, and the row order of q and k.

llama.cpp stores the query and key projections of its ``llama`` architecture with the rows of each head
reordered for rotary embeddings over adjacent pairs; the Hugging Face layout, and ours, rotates split
halves. Other architectures are stored as they are.
"""

from __future__ import annotations

import re
from typing import Any, Final

import numpy.typing as npt

HF_CLASSES: Final = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""GGUF architectures that are read and written, with their Hugging Face class."""

PERMUTED_ARCHITECTURES: Final = frozenset({"llama"})
"""GGUF architectures whose q and k rows are reordered."""

EMBEDDING: Final = "token_embd.weight"
OUTPUT: Final = "output.weight"

TOP_LEVEL: Final = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    OUTPUT: "lm_head.weight",
}
PER_LAYER: Final = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.bias": "self_attn.o_proj.bias",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_gate.bias": "mlp.gate_proj.bias",
    "ffn_up.bias": "mlp.up_proj.bias",
    "ffn_down.bias": "mlp.down_proj.bias",
}
REQUIRED_PER_LAYER: Final = tuple(PER_LAYER)[:9]
"""What every layer of every supported architecture has."""

_GGUF_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(.+)")
_HF_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d{0,5})\.(.+)")
_TO_GGUF = {hf: gguf for gguf, hf in (TOP_LEVEL | PER_LAYER).items()}


def to_huggingface(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor; None when there is none."""
    if name in TOP_LEVEL:
        return TOP_LEVEL[name]
    match = _GGUF_LAYER.fullmatch(name)
    if match is None or match[2] not in PER_LAYER:
        return None
    return f"model.layers.{match[1]}.{PER_LAYER[match[2]]}"


def to_gguf(name: str) -> str | None:
    """The GGUF name of a Hugging Face tensor; None when there is none."""
    match = _HF_LAYER.fullmatch(name)
    if match is None:
        return _TO_GGUF.get(name) if name in TOP_LEVEL.values() else None
    suffix = _TO_GGUF.get(match[2])
    return f"blk.{match[1]}.{suffix}" if suffix in PER_LAYER else None


def rotary_projection(hf_name: str) -> str | None:
    """``"q"`` or ``"k"`` when the tensor is that projection's weight or bias, else None."""
    match = re.search(r"self_attn\.([qk])_proj\.(?:weight|bias)$", hf_name)
    return match[1] if match else None


def split_halves(rows: npt.NDArray[Any], head_dim: int) -> npt.NDArray[Any]:
    """Rows of whole heads from adjacent-pair order (llama.cpp) to split-half order (Hugging Face).

    ``rows`` is ``[heads * head_dim, ...]``. In each head, llama.cpp's rows 2i and 2i+1 are rows i and
    i + head_dim/2 of the split-half order.
    """
    heads = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return heads.swapaxes(1, 2).reshape(rows.shape)


def adjacent_pairs(rows: npt.NDArray[Any], head_dim: int) -> npt.NDArray[Any]:
    """The inverse of ``split_halves``."""
    heads = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return heads.swapaxes(1, 2).reshape(rows.shape)
