"""What GGUF's names mean in Hugging Face's terms, both ways, and the row order of q and k.

Which names a family has is in its file. llama.cpp stores the query and key projections of its ``llama``
architecture with the rows of each head reordered for rotary embeddings over adjacent pairs; the Hugging
Face layout, and ours, rotates split halves. Other architectures are stored as they are.
"""

from __future__ import annotations

import re
from typing import Any, Final

import numpy.typing as npt

from apr_dist.model.families import GgufForm

EMBEDDING: Final = "token_embd.weight"
OUTPUT: Final = "output.weight"
ROPE_FACTORS: Final = "rope_freqs.weight"
"""By what the frequency of each pair of dimensions is divided; computed, not trained."""

_GGUF_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(.+)")
_HF_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d{0,5})\.(.+)")


def to_huggingface(name: str, form: GgufForm) -> str | None:
    """The Hugging Face name of a family's GGUF tensor; None when there is none."""
    match = _GGUF_LAYER.fullmatch(name)
    found = form.tensors.get(match[2] if match else name)
    if found is None or _is_top_level(found) is not (match is None):
        return None
    return f"model.layers.{match[1]}.{found}" if match else found


def to_gguf(name: str, form: GgufForm) -> str | None:
    """The GGUF name of a family's Hugging Face tensor, of several the first; None when there is none."""
    return next(iter(all_gguf(name, form)), None)


def all_gguf(name: str, form: GgufForm) -> tuple[str, ...]:
    """The GGUF names of a family's Hugging Face tensor: two where it joins the gates and ups of experts."""
    match = _HF_LAYER.fullmatch(name)
    wanted = match[2] if match else name
    if _is_top_level(wanted) is not (match is None):
        return ()
    prefix = f"blk.{match[1]}." if match else ""
    return tuple(prefix + gguf for gguf, hf in form.tensors.items() if hf == wanted)


def part_of(values: npt.NDArray[Any], index: int, parts: int) -> npt.NDArray[Any]:
    """Of ``[experts, parts * rows, columns]`` one part of each expert's rows."""
    if parts == 1:
        return values
    experts, rows, columns = values.shape
    return values.reshape(experts, parts, rows // parts, columns)[:, index]


def _is_top_level(hf_name: str) -> bool:
    return hf_name.startswith(("model.", "lm_head."))


def norm_shift(hf_name: str, form: GgufForm) -> float:
    """What a GGUF file adds to the tensor: one to the norms of a family that multiplies by one plus these."""
    return form.norm_shift if hf_name.endswith("norm.weight") else 0.0


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
