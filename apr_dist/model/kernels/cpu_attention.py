"""Causal attention on the CPU out of matrix products, where ``matmul`` has faster ones than PyTorch's kernel.

PyTorch's kernel for the CPU multiplies through MKL, in tiles too small for 16-bit types. Here the query heads
that share a KV head are rows of one product, some positions at a time, so scores of the whole sequence are
never held; of short sequences all heads are multiplied in one batch. Scores, softmax and its gradient are
f32. Nothing but query, key and value is kept for backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from apr_dist.model.kernels.products import MatmulBackend, cpu_matmul_backend, mm

BLOCK_ROWS: Final = 1024
"""Queries of one KV head worked on at once; with fewer, threads wait for each other."""

APART_LENGTH: Final = 512
"""Positions from which on a head is worked on alone: its products are then large enough to be fast."""

SPAN: Final = {torch.float32: 32, torch.bfloat16: 64}
"""Positions of shorter sequences whose scores are computed together, for all heads; no other types."""

SCORES: Final = 4 << 20
"""Scores that are held at once where heads are worked on together."""

LEAST_LENGTH: Final = 128
"""Positions from which on this is faster than PyTorch's kernel, measured; at 64 both take as long in f32."""


def is_faster(query: Tensor, key: Tensor) -> bool:
    """Whether `causal_attention` is the faster way; a function of processor, types and shapes alone."""
    return (
        cpu_matmul_backend() is MatmulBackend.ONEDNN
        and query.shape[1] == key.shape[1]
        and query.dtype in SPAN
        and query.shape[1] >= LEAST_LENGTH
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of ``[batch, seq, heads, head_dim]`` over keys and values with fewer heads.

    Returns:
        ``[batch, seq, heads, head_dim]``.
    """
    return _CausalAttention.apply(query, key, value)  # type: ignore[no-any-return,no-untyped-call]


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return torch.ops.apr_dist.causal_attention(query, key, value)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = ctx.saved_tensors
        return _backward(query, key, value, gradient)


class _Heads(NamedTuple):
    """Some KV heads of some sequences, and the query heads that read them; ``n`` heads in all.

    ``where`` finds them in a ``[batch, kv_heads, seq, group, head_dim]`` tensor.
    """

    where: tuple[slice, slice]
    query: Tensor  # [n, seq, group, head_dim]
    key: Tensor  # [n, seq, head_dim]
    value: Tensor  # [n, seq, head_dim]


def _grouped(tensor: Tensor, key: Tensor) -> Tensor:
    """``[batch, seq, heads, head_dim]`` as ``[batch, kv_heads, seq, group, head_dim]``."""
    return tensor.view(*tensor.shape[:2], key.shape[2], -1, tensor.shape[3]).transpose(1, 2)


def _packed(part: Tensor) -> Tensor:
    """``[batch, kv_heads, ...]`` as ``[batch * kv_heads, ...]``, contiguous."""
    return part.reshape(-1, *part.shape[2:]).contiguous()


def _heads(query: Tensor, key: Tensor, value: Tensor) -> Iterator[_Heads]:
    """All heads of some sequences where these are short, else one after another."""
    parts = (_grouped(query, key), key.transpose(1, 2), value.transpose(1, 2))
    batch, kv_heads, length, group, _ = parts[0].shape
    rows, heads = 1, 1
    if length < APART_LENGTH:
        rows, heads = max(1, SCORES // (kv_heads * group * SPAN[query.dtype] * length)), kv_heads
    for row in range(0, batch, rows):
        for head in range(0, kv_heads, heads):
            where = (slice(row, row + rows), slice(head, head + heads))
            yield _Heads(where, *(_packed(part[where]) for part in parts))


def _spans(length: int, group: int, dtype: torch.dtype) -> list[slice]:
    """Positions whose scores are worked on together; the first span is as long as any."""
    step = SPAN[dtype] if length < APART_LENGTH else max(1, BLOCK_ROWS // group)
    step = math.ceil(length / math.ceil(length / step))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _later(spans: list[slice]) -> Tensor:
    """Minus infinity where a position of a span would see a later one of it, ``[span, 1, span]``."""
    longest = spans[0].stop
    return torch.full((longest, longest), -torch.inf).triu_(1).unsqueeze(1)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``[n, m, k]`` and ``[n, k, l]`` to ``[n, m, l]``."""
    return mm(left[0], right[0])[None] if left.shape[0] == 1 else torch.bmm(left, right)


def _probabilities(rows: Tensor, key: Tensor, later: Tensor) -> Tensor:
    """f32 softmax ``[n, positions * group, seq]``.

    ``rows`` ``[n, positions, group, head_dim]`` are the last positions of ``key`` ``[n, seq, head_dim]``.
    """
    count, positions = rows.shape[:2]
    scores = _product(rows.flatten(1, 2), key.mT)
    last = scores.view(count, positions, -1, key.shape[1])[..., key.shape[1] - positions :]
    last += later[:positions, :, :positions]
    return torch.softmax(scores, dim=2, out=scores)


def _forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    mixed = query.new_empty(query.shape)
    grouped = _grouped(mixed, key)
    with torch.autocast("cpu", enabled=False):
        spans = _spans(query.shape[1], grouped.shape[3], query.dtype)
        later = _later(spans)
        for heads in _heads(query, key, value):
            rows, keys = heads.query.float() * query.shape[3] ** -0.5, heads.key.float()
            out = grouped[heads.where]
            for span in spans:
                part = rows[:, span]
                shares = _probabilities(part, keys[:, : span.stop], later)
                product = _product(shares.to(query.dtype), heads.value[:, : span.stop])
                out[:, :, span] = product.view(*out.shape[:2], *part.shape[1:])
    return mixed


def _backward(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale, dtype = query.shape[3] ** -0.5, query.dtype
    d_query, d_key, d_value = (torch.empty_like(tensor) for tensor in (query, key, value))
    d_grouped, given = _grouped(d_query, key), _grouped(gradient, key)
    spans = _spans(query.shape[1], given.shape[3], dtype)
    later = _later(spans)
    for heads in _heads(query, key, value):
        rows, keys, values = heads.query.float() * scale, heads.key.float(), heads.value.float()
        upstream, d_rows = _packed(given[heads.where]), d_grouped[heads.where]
        # Their transposes: the product that would give them as they are copies all scores first.
        d_keys, d_values = (keys.new_zeros(keys.mT.shape) for _ in range(2))
        for span in spans:
            part, end = rows[:, span], span.stop
            shares = _probabilities(part, keys[:, :end], later)
            flat = upstream[:, span].flatten(1, 2)
            d_values[..., :end] += _product(flat.mT, shares.to(dtype))
            d_scores = torch.ops.aten._softmax_backward_data(
                _product(flat.float(), values[:, :end].mT), shares, 2, torch.float32
            ).to(dtype)
            d_keys[..., :end] += _product(heads.query[:, span].flatten(1, 2).mT, d_scores)
            d_part = _product(d_scores, heads.key[:, :end]).mul_(scale)
            d_rows[:, :, span] = d_part.view(*d_rows.shape[:2], *part.shape[1:])
        for target, transposed in ((d_key, d_keys.mul_(scale)), (d_value, d_values)):
            part = target.transpose(1, 2)[heads.where]
            part.copy_(transposed.mT.view(part.shape))
    return d_query, d_key, d_value


# An operator of its own, so that selective checkpointing can keep its result as that of PyTorch's.
_LIBRARY: Final = torch.library.Library("apr_dist", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("causal_attention(Tensor query, Tensor key, Tensor value) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.impl("causal_attention", _forward, "CPU")  # type: ignore[no-untyped-call]
