"""One gradient of a weight that is both embedding and head, where autograd would make and add two.

The head's gradient ``[vocab, hidden]`` waits from the loss' backward to that of the lookup, which adds the
rows of its ids to it and hands it on as the weight's only one: no second gradient of that size, nor a pass
over both to add them. The order is not left to chance: the gradient of the hidden states, which the lookup's
backward needs, goes the same way. By `add_summed_rows` the sum is autograd's bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

from apr_dist.model.kernels.loss import gradient_dtype


class TiedGradient:
    """The head's gradient of one forward pass, between the two backwards."""

    def __init__(self) -> None:
        self._head: Tensor | None = None

    def catch(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states and weight for the loss; what it gives back for the weight waits here.

        Whoever gives that gradient must let go of it, for rows are added to it in place.
        """
        caught: tuple[Tensor, Tensor] = _Catch.apply(hidden, weight.detach(), self)  # type: ignore[no-untyped-call]
        return caught

    def hold(self, gradient: Tensor | None) -> None:
        """Keep the head's gradient, in place of one that nobody came for."""
        self._head = gradient

    def take(self) -> Tensor | None:
        """The head's gradient, which is then no longer held."""
        head, self._head = self._head, None
        return head


AddRows = Callable[[Tensor, Tensor, Tensor], None]
"""Adds rows ``[n, hidden]`` to those of a ``[vocab, hidden]`` tensor with integer ids ``[n]``, in place."""


def look_up(weight: Tensor, ids: Tensor, tied: TiedGradient | None, add: AddRows) -> Tensor:
    """Rows of ``weight`` ``[vocab, hidden]`` for integer ids, whose gradient joins a tied head's.

    Returns:
        ``[..., hidden]`` for ids ``[...]``, in the type that the weight's gradient has.
    """
    if tied is None and gradient_dtype(weight) is weight.dtype:
        return F.embedding(ids, weight)
    return _LookUp.apply(weight, ids, tied, add)  # type: ignore[no-any-return,no-untyped-call]


def add_rows(head: Tensor, ids: Tensor, rows: Tensor) -> None:
    """In the order of the ids, so the same every time, and without waiting for a count."""
    head.index_put_((ids.long(),), rows, accumulate=True)


def add_summed_rows(head: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Rows of one id are summed before they join the head's, as autograd does."""
    distinct, places = torch.unique(ids, return_inverse=True)
    head.index_add_(0, distinct, _dense(rows, places, distinct.shape[0]))


class _Catch(torch.autograd.Function):
    """Both inputs as they are. Backward passes one gradient on and keeps the other's."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tied: TiedGradient) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.tied = tied
        return hidden, weight

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_hidden: Tensor | None, d_weight: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        ctx.tied.hold(d_weight)
        return d_hidden, None, None


class _LookUp(torch.autograd.Function):
    """The lookup whose gradient is the held one and its own rows."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, tied: TiedGradient | None, add: AddRows) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.vocab_size, ctx.tied, ctx.add = weight.shape[0], tied, add
        return F.embedding(ids, weight).to(gradient_dtype(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (ids,) = ctx.saved_tensors
        head = None if ctx.tied is None else ctx.tied.take()
        if head is None:
            return _dense(gradient, ids, ctx.vocab_size), None, None, None
        head = head.to(gradient.dtype)
        ctx.add(head, ids.reshape(-1), gradient.reshape(-1, gradient.shape[-1]))
        return head, None, None, None


def _dense(gradient: Tensor, ids: Tensor, rows: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(gradient, ids, rows, -1, False)  # type: ignore[no-any-return]
