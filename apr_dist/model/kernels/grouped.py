"""Products of rows with the matrix of their group, and the permutation that brings groups together.

PyTorch's `grouped_mm` is one kernel for all groups; it wants rows of whole 16 bytes. Elsewhere a loop takes
one product a group, of whose sizes the host has to know.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

Multiply = Callable[[Tensor, Tensor], Tensor]
"""``left @ right`` for matrices of any strides."""

_ALIGNED_BYTES = 16


def runs_grouped_mm(rows: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch has its kernel, and takes rows ``[n, in]`` and weights ``[groups, out, in]``."""
    widths = (rows.shape[1] * rows.element_size(), weight.shape[1] * rows.element_size())
    return hasattr(F, "grouped_mm") and not any(width % _ALIGNED_BYTES for width in widths)


def grouped_mm(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """``[n, out]``: each of the ``[n, in]`` rows times its group's ``[out, in]``, by one kernel.

    Args:
        rows: sorted by group.
        weight: ``[groups, out, in]``, of the rows' type.
        counts: rows of each group, integers ``[groups]``, on their device.
    """
    ends = counts.cumsum(0).to(torch.int32)
    product: Tensor = F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    return product


def looped(rows: Tensor, weight: Tensor, counts: Tensor, multiply: Multiply = torch.mm) -> Tensor:
    """As `grouped_mm`, one product a group; waits for the counts, and takes weights of any type."""
    return _Loop.apply(rows, weight, counts, multiply)  # type: ignore[no-any-return,no-untyped-call]


class _Loop(torch.autograd.Function):
    """See `looped`; a group without rows has a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, counts: Tensor, multiply: Multiply) -> Tensor:
        ctx.spans, ctx.multiply = tuple(_spans(counts)), multiply
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)
        out = rows.new_empty(rows.shape[0], weight.shape[1])
        for group, part in ctx.spans:
            out[part] = multiply(rows[part], weight[group].to(rows.dtype).t())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        d_rows = d_weight = None
        if ctx.needs_input_grad[0]:
            d_rows = gradient.new_empty(gradient.shape[0], weight.shape[2])
            for group, part in ctx.spans:
                d_rows[part] = ctx.multiply(gradient[part], weight[group].to(gradient.dtype))
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight)
            for group, part in ctx.spans:
                d_weight[group] = ctx.multiply(gradient[part].t(), rows[part])
        return d_rows, d_weight, None, None


def _spans(counts: Tensor) -> Iterator[tuple[int, slice]]:
    """Each group that has rows, and where they are."""
    ends = itertools.accumulate(counts.tolist())
    for group, (start, end) in enumerate(itertools.pairwise((0, *ends))):
        if end > start:
            yield group, slice(start, end)


def taken(x: Tensor, places: Tensor, back: Tensor) -> Tensor:
    """Rows of ``[n, width]`` at integer ``places`` ``[m]``, in that order.

    Args:
        x: rows, of which each is taken equally often.
        places: which are taken.
        back: ``[n, times]``, where in the result each row is: its gradients are there, and summed in that
            order, so that they are the same every time on every device.
    """
    return _Taken.apply(x, places, back)  # type: ignore[no-any-return,no-untyped-call]


class _Taken(torch.autograd.Function):
    """See `taken`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x[places]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        if back.shape[1] == 1:
            return gradient[back[:, 0]], None, None
        return gradient[back].sum(1), None, None
