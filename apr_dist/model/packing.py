"""Attention of several documents packed into one sequence: each sees itself only.

What documents mean to the attention kernel is worked out once per forward pass and shared by all blocks;
no ``[seq, seq]`` mask of them is ever held. On the CPU each document is attended on its own. On CUDA the
variable-length kernel runs where it can (16-bit types, compute capability 8.0 and later), flex attention
elsewhere. A sliding window over whole rows goes the same way where the variable-length kernel runs; elsewhere
it is one mask for all blocks.
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

BLOCK = 128
"""Side of the blocks that flex attention takes or leaves."""

CausalAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Plain causal attention of ``[batch, seq, heads, head_dim]``."""


class PackedKernel(StrEnum):
    """Who computes attention that does not see everything before it; ``band`` is one mask for whole rows."""

    SPANS = "spans"
    VARLEN = "varlen"
    FLEX = "flex"
    BAND = "band"


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
        band: of `band`, for a sliding window over whole rows (band).
    """

    kernel: PackedKernel
    spans: tuple[tuple[int, int, int], ...] = ()
    boundaries: Tensor | None = None
    longest: int = 0
    shares_heads: bool = True
    block_mask: BlockMask | None = None
    band: Tensor | None = None


def packed_kernel(device: torch.device, dtype: torch.dtype) -> PackedKernel:
    """The kernel for tensors of that device and type."""
    if device.type != "cuda":
        return PackedKernel.SPANS
    new_enough = torch.cuda.get_device_capability(device) >= (8, 0)
    narrow = dtype in (torch.bfloat16, torch.float16)
    return PackedKernel.VARLEN if new_enough and narrow else PackedKernel.FLEX


@dataclass(frozen=True)
class Boundaries:
    """Where the documents of a batch begin, on its device: known beforehand, it needs no waiting to learn.

    Attributes:
        edges: int32 ``[documents + 1]``, first token of each document in the flattened batch, and its end;
            no document crosses rows.
        shape: ``(batch, seq)``.
    """

    edges: Tensor
    shape: tuple[int, int]

    @staticmethod
    def from_ids(document_ids: Tensor) -> Boundaries:
        """From integers ``[batch, seq]``, a new document where the id changes; waits for their device."""
        batch, length = document_ids.shape
        begins = torch.ones_like(document_ids, dtype=torch.bool)
        begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        starts = begins.flatten().nonzero().flatten()
        end = starts.new_full((1,), batch * length)
        return Boundaries(torch.cat((starts, end)).int(), (batch, length))

    @staticmethod
    def of_rows(batch: int, length: int, device: torch.device) -> Boundaries:
        """Every row is one document."""
        edges = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
        return Boundaries(edges, (batch, length))

    def row(self, index: int) -> Boundaries:
        """Those of one row, as a batch of one; waits for the device."""
        length = self.shape[1]
        edges = self.edges - index * length
        return Boundaries(edges[(edges >= 0) & (edges <= length)], (1, length))


def find_documents(
    documents: Tensor | Boundaries,
    *,
    dtype: torch.dtype,
    window: int | None = None,
    kernel: PackedKernel | None = None,
) -> Documents:
    """Prepare a batch's documents for attention.

    Args:
        documents: where they begin, or integers ``[batch, seq]``; a new document begins where the id changes.
        dtype: type of queries, keys and values.
        window: sliding window in tokens, where the model has one.
        kernel: which kernel; by default that of the device and type.
    """
    found = Boundaries.from_ids(documents) if isinstance(documents, Tensor) else documents
    kernel = kernel or packed_kernel(found.edges.device, dtype)
    length = found.shape[1]
    if kernel is PackedKernel.FLEX:
        return Documents(kernel=kernel, block_mask=_block_mask(found, window))
    if kernel is PackedKernel.VARLEN:
        # Every batch has another number of documents: one compiled block for all of them.
        torch._dynamo.mark_dynamic(found.edges, 0)
        return Documents(kernel=kernel, boundaries=found.edges, longest=length, shares_heads=_shares_heads())
    edges = itertools.pairwise(found.edges.tolist())
    spans = tuple((a // length, a % length, a % length + b - a) for a, b in edges)
    return Documents(kernel=kernel, spans=spans)


def find_windows(tokens: Tensor, window: int, *, dtype: torch.dtype) -> Documents | None:
    """Prepare whole rows for attention through a sliding window; None where the window hides nothing.

    The variable-length kernel needs no mask; elsewhere there is one for all blocks.

    Args:
        tokens: ``[batch, seq]``, for shape and device.
        window: positions that one sees, its own among them.
        dtype: type of queries, keys and values.
    """
    (batch, length), device = tokens.shape, tokens.device
    if window >= length:
        return None
    if packed_kernel(device, dtype) is PackedKernel.VARLEN:
        return find_documents(Boundaries.of_rows(batch, length, device), dtype=dtype, window=window)
    return Documents(kernel=PackedKernel.BAND, band=band(length, length, window, device))


def band(new: int, length: int, window: int, device: torch.device) -> Tensor:
    """``[new, length]``, true where a query may look: the last ``window`` positions up to its own."""
    full = torch.ones(length, length, dtype=torch.bool, device=device).tril_().triu_(1 - window)
    return full[length - new :]


def attend_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    documents: Documents,
    causal: CausalAttention,
    window: int | None,
) -> Tensor:
    """Causal attention within each document or window; shapes as `apr_dist.model.attention.causal_attention`.

    Args:
        query: ``[batch, seq, heads, head_dim]``.
        key: ``[batch, seq, kv_heads, head_dim]``.
        value: like ``key``.
        documents: of `find_documents`, for the same batch.
        causal: attention of one document (spans), or through a band.
        window: sliding window in tokens, where the model has one.
    """
    if documents.kernel is PackedKernel.BAND:
        return causal(query, key, value)
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


def _block_mask(boundaries: Boundaries, window: int | None) -> BlockMask:
    """Which blocks of the score matrix are seen in part and which whole; nothing of ``[seq, seq]`` is made.

    A query sees the keys from ``first[query]`` to itself. As ``first`` never falls, a block of queries sees
    every block of keys from its first query's first to its own; whole are those behind its last query's
    first, and before its own.
    """
    from torch.nn.attention.flex_attention import BlockMask  # noqa: PLC0415  (loads the compiler)

    (batch, length), device = boundaries.shape, boundaries.edges.device
    places = torch.arange(batch * length, dtype=torch.int32, device=device)
    document = torch.searchsorted(boundaries.edges, places, right=True) - 1
    first = (boundaries.edges[document] % length).view(batch, length)
    if window is not None:
        first = first.maximum(places[:length] - (window - 1))
    own = torch.arange(-(-length // BLOCK), dtype=torch.int32, device=device)
    some_from = first[:, ::BLOCK] // BLOCK
    all_from = own.expand(batch, -1).clone()  # a block that the row's end cuts off counts none as whole
    all_from[:, : length // BLOCK] = (first[:, BLOCK - 1 :: BLOCK] + (BLOCK - 1)) // BLOCK
    before = own < own[:, None]
    whole = before & (own >= all_from[..., None])
    part = (before | (own == own[:, None])) & (own >= some_from[..., None]) & ~whole

    def visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (key >= first[row, query])

    return BlockMask.from_kv_blocks(
        *_listed(part), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(length, length)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Bool ``[batch, rows, columns]`` to how many each row has, and which, these first; one for all heads."""
    which = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], which.int()[:, None]


def _shares_heads() -> bool:
    """Whether the variable-length kernel takes fewer KV heads than query heads (not in PyTorch 2.11)."""
    from torch.nn.attention import varlen  # noqa: PLC0415  (loads the compiler, for seconds)

    return "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention  # noqa: PLC0415  (loads the compiler)

    return torch.compile(flex_attention, dynamic=False)
