"""Attention of several documents packed into one sequence: each sees itself only.

Documents are runs of equal ids in ``[batch, seq]``. What they mean to the attention kernel is worked
out once per forward pass and shared by all blocks; no ``[seq, seq]`` mask is ever held. On the CPU each
document is attended on its own. On CUDA the variable-length kernel runs where it can (16-bit types,
compute capability 8.0 and later), flex attention elsewhere.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

CausalAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Plain causal attention of ``[batch, seq, heads, head_dim]``."""


class PackedKernel(StrEnum):
    """Who computes block-diagonal attention."""

    SPANS = "spans"
    VARLEN = "varlen"
    FLEX = "flex"


@dataclass(frozen=True)
class Documents:
    """The documents of one batch, as the chosen kernel needs them.

    Attributes:
        kernel: who computes.
        spans: ``(row, start, stop)`` of each document (spans).
        boundaries: int32 ``[documents + 1]``, first token of each in the flattened batch (varlen).
        longest: tokens of the longest document, or of a row as its bound (varlen).
        shares_heads: whether the kernel takes fewer KV heads than query heads (varlen).
        block_mask: which blocks of the score matrix exist (flex).
    """

    kernel: PackedKernel
    spans: tuple[tuple[int, int, int], ...] = ()
    boundaries: Tensor | None = None
    longest: int = 0
    shares_heads: bool = True
    block_mask: BlockMask | None = None


def packed_kernel(device: torch.device, dtype: torch.dtype) -> PackedKernel:
    """The kernel for tensors of that device and type."""
    if device.type != "cuda":
        return PackedKernel.SPANS
    new_enough = torch.cuda.get_device_capability(device) >= (8, 0)
    narrow = dtype in (torch.bfloat16, torch.float16)
    return PackedKernel.VARLEN if new_enough and narrow else PackedKernel.FLEX


def find_documents(
    document_ids: Tensor, *, dtype: torch.dtype, window: int | None = None, kernel: PackedKernel | None = None
) -> Documents:
    """Prepare a batch's documents for attention.

    Args:
        document_ids: integers ``[batch, seq]``; a new document begins where the id changes.
        dtype: type of queries, keys and values.
        window: sliding window in tokens, where the model has one.
        kernel: which kernel; by default that of the device and type.
    """
    kernel = kernel or packed_kernel(document_ids.device, dtype)
    if kernel is PackedKernel.FLEX:
        return Documents(kernel=kernel, block_mask=_block_mask(document_ids, window))
    batch, length = document_ids.shape
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    if kernel is PackedKernel.VARLEN:
        end = torch.tensor([batch * length], device=starts.device)
        boundaries = torch.cat((starts, end)).int()
        return Documents(kernel=kernel, boundaries=boundaries, longest=length, shares_heads=_shares_heads())
    edges = [*starts.tolist(), batch * length]
    spans = tuple((a // length, a % length, a % length + b - a) for a, b in itertools.pairwise(edges))
    return Documents(kernel=kernel, spans=spans)


def attend_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    documents: Documents,
    causal: CausalAttention,
    window: int | None,
) -> Tensor:
    """Causal attention within each document; shapes as `apr_dist.model.attention.causal_attention`.

    Args:
        query: ``[batch, seq, heads, head_dim]``.
        key: ``[batch, seq, kv_heads, head_dim]``.
        value: like ``key``.
        documents: of `find_documents`, for the same batch.
        causal: attention of one document (spans).
        window: sliding window in tokens, where the model has one.
    """
    if documents.kernel is PackedKernel.SPANS:
        return _attend_spans(query, key, value, documents, causal)
    if documents.kernel is PackedKernel.VARLEN:
        return _attend_varlen(query, key, value, documents, window)
    mixed: Any = _compiled_flex()(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        block_mask=documents.block_mask,
        enable_gqa=key.shape[2] != query.shape[2],
    )
    return mixed.transpose(1, 2)  # type: ignore[no-any-return]


def _attend_spans(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, causal: CausalAttention
) -> Tensor:
    rows: list[list[Tensor]] = [[] for _ in range(query.shape[0])]
    for row, start, stop in documents.spans:
        parts = (tensor[row : row + 1, start:stop] for tensor in (query, key, value))
        rows[row].append(causal(*parts))
    return torch.cat([torch.cat(parts, dim=1) for parts in rows], dim=0)


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int | None
) -> Tensor:
    from torch.nn.attention import varlen  # noqa: PLC0415  (loads the compiler, for seconds)

    groups = query.shape[2] // key.shape[2]
    options: dict[str, Any] = {}
    if groups > 1 and documents.shares_heads:
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
    mixed = varlen.varlen_attn(
        query.flatten(0, 1),
        key.flatten(0, 1),
        value.flatten(0, 1),
        documents.boundaries,  # type: ignore[arg-type]
        documents.boundaries,
        documents.longest,
        documents.longest,
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    return mixed.view(query.shape)  # type: ignore[union-attr]


def _block_mask(document_ids: Tensor, window: int | None) -> BlockMask:
    from torch.nn.attention.flex_attention import create_block_mask  # noqa: PLC0415  (loads the compiler)

    def visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = document_ids[row, query] == document_ids[row, key]
        near = query - key < (document_ids.shape[1] if window is None else window)
        return same & (query >= key) & near

    batch, length = document_ids.shape
    return create_block_mask(visible, batch, None, length, length, device=document_ids.device)


def _shares_heads() -> bool:
    """Whether the variable-length kernel takes fewer KV heads than query heads (not in PyTorch 2.11)."""
    from torch.nn.attention import varlen  # noqa: PLC0415  (loads the compiler, for seconds)

    return "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention  # noqa: PLC0415  (loads the compiler)

    return torch.compile(flex_attention, dynamic=False)
