"""Causal attention on the CPU out of matrix products, where ``matmul`` has faster ones than PyTorch's kernel.

PyTorch's kernel for the CPU multiplies through MKL, in tiles too small for 16-bit types. Here the query heads
that share a KV head are rows of one product, some positions at a time, so scores of the whole sequence are
never held. Scores, softmax and its gradient are f32. Nothing but query, key and value is kept for backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from apr_dist.model.matmul import MatmulBackend, cpu_matmul_backend, linear, mm

BLOCK_ROWS: Final = 1024
"""Queries of one KV head worked on at once; with fewer, threads wait for each other."""

LEAST_LENGTH: Final = 1024
"""Positions from which on this was measured to be faster than PyTorch's kernel; at 256 both take as long."""


def has_causal_attention(query: Tensor, key: Tensor) -> bool:
    """Whether `causal_attention` is the faster way; a function of processor, types and shapes alone."""
    return (
        query.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and cpu_matmul_backend() is MatmulBackend.ONEDNN
        and query.shape[1] == key.shape[1]
        and query.shape[1] >= LEAST_LENGTH
        and query.dtype in {torch.float32, torch.bfloat16}
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


class _Head(NamedTuple):
    """One KV head of one sequence, and the query heads that read it.

    A query's row ``position * group + head`` belongs to a position; ``where`` finds it in a
    ``[batch, seq, kv_heads, group, head_dim]`` tensor.
    """

    where: tuple[int, slice, int]
    query: Tensor  # [seq, group, head_dim]
    key: Tensor  # [seq, head_dim]
    value: Tensor  # [seq, head_dim]


def _grouped(tensor: Tensor, key: Tensor) -> Tensor:
    """``[batch, seq, heads, head_dim]`` as ``[batch, seq, kv_heads, group, head_dim]``."""
    return tensor.view(*tensor.shape[:2], key.shape[2], -1, tensor.shape[3])


def _heads(query: Tensor, key: Tensor, value: Tensor) -> Iterator[_Head]:
    grouped = _grouped(query, key)
    for row in range(key.shape[0]):
        for head in range(key.shape[2]):
            where = (row, slice(None), head)
            yield _Head(where, *(tensor[where].contiguous() for tensor in (grouped, key, value)))


def _spans(length: int, group: int) -> list[slice]:
    """Positions whose scores are worked on together; the first span is as long as any."""
    step = max(1, BLOCK_ROWS // group)
    step = math.ceil(length / math.ceil(length / step))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _later(spans: list[slice]) -> Tensor:
    """Minus infinity where a position of a span would see a later one of it, ``[span, 1, span]``."""
    longest = spans[0].stop
    return torch.full((longest, longest), -torch.inf).triu_(1).unsqueeze(1)


def _probabilities(rows: Tensor, key: Tensor, later: Tensor) -> Tensor:
    """f32 softmax ``[positions * group, seq]`` of ``[positions, group, head_dim]``, the sequence's last."""
    positions = rows.shape[0]
    scores = linear(rows.flatten(0, 1), key)
    last = scores.view(positions, -1, key.shape[0])[:, :, key.shape[0] - positions :]
    last += later[:positions, :, :positions]
    return torch.softmax(scores, dim=1, out=scores)


def _forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    mixed = query.new_empty(query.shape)
    grouped = _grouped(mixed, key)
    spans = _spans(query.shape[1], grouped.shape[3])
    later = _later(spans)
    with torch.autocast("cpu", enabled=False):
        for head in _heads(query, key, value):
            rows, keys = head.query.float() * query.shape[3] ** -0.5, head.key.float()
            out, transposed = grouped[head.where], head.value.t()
            for span in spans:
                part = rows[span]
                shares = _probabilities(part, keys[: span.stop], later)
                product = linear(shares.to(query.dtype), transposed[:, : span.stop])
                out[span] = product.view(part.shape)
    return mixed


def _backward(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale, dtype = query.shape[3] ** -0.5, query.dtype
    d_query, d_key, d_value = (torch.empty_like(tensor) for tensor in (query, key, value))
    d_grouped = _grouped(d_query, key)
    given = _grouped(gradient, key)
    spans = _spans(query.shape[1], given.shape[3])
    later = _later(spans)
    for head in _heads(query, key, value):
        rows, keys, values = head.query.float() * scale, head.key.float(), head.value.float()
        upstream, d_rows = given[head.where].contiguous(), d_grouped[head.where]
        # Their transposes: the product that would give them as they are copies all scores first.
        d_keys, d_values = keys.new_zeros(keys.t().shape), keys.new_zeros(keys.t().shape)
        for span in spans:
            part, end = rows[span], span.stop
            shares = _probabilities(part, keys[:end], later)
            flat = upstream[span].flatten(0, 1)
            d_values[:, :end] += mm(flat.t(), shares.to(dtype))
            d_scores = torch.ops.aten._softmax_backward_data(
                linear(flat.float(), values[:end]), shares, 1, torch.float32
            ).to(dtype)
            d_keys[:, :end] += mm(head.query[span].flatten(0, 1).t(), d_scores)
            d_rows[span] = mm(d_scores, head.key[:end]).view(part.shape).mul_(scale)
        d_key[head.where], d_value[head.where] = d_keys.mul_(scale).t(), d_values.t()
    return d_query, d_key, d_value


# An operator of its own, so that selective checkpointing can keep its result as that of PyTorch's.
_LIBRARY: Final = torch.library.Library("apr_dist", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("causal_attention(Tensor query, Tensor key, Tensor value) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.impl("causal_attention", _forward, "CPU")  # type: ignore[no-untyped-call]
