"""Cross-entropy over the vocabulary: chunk by chunk without holding the logits, and of logits that are there.

In the first the head's product, the softmax and both gradients are computed for a chunk of tokens at a
time, in the forward pass, so the largest temporary is one chunk of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

from apr_dist.model.flops import HEAD_GRADIENT_ROWS, logits_chunk

IGNORE_INDEX: Final = -100
"""Target of a position that does not count."""


class Loss(NamedTuple):
    """A summed loss.

    Attributes:
        total: f32 sum in nats, z-loss included.
        penalty: what z-loss added to it, without a graph.
        targets: int64, how many targets count.
    """

    total: Tensor
    penalty: Tensor
    targets: Tensor


@dataclass(frozen=True)
class LossTerms:
    """What a loss is besides the cross-entropy of plain logits.

    Attributes:
        z_loss: weight of ``logsumexp(logits)^2``.
        softcap: logits ``l`` become ``softcap * tanh(l / softcap)`` first; None: they stay.
    """

    z_loss: float = 0.0
    softcap: float | None = None


@dataclass(frozen=True)
class LossStyle:
    """How a device likes the chunked loss computed; only rounding depends on it.

    Attributes:
        mm: product of two matrices of any strides.
        pass_bytes: logits in f32 that several passes go over together; None: those of a whole chunk.
        may_wait: whether values may be read to skip what changes nothing; on a GPU that is a wait.
    """

    mm: Callable[[Tensor, Tensor], Tensor] = torch.mm
    pass_bytes: int | None = None
    may_wait: bool = False


def count_targets(targets: Tensor) -> Tensor:
    """How many targets count, int64."""
    return (targets != IGNORE_INDEX).sum()


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    """``softcap * tanh(logits / softcap)``, or the logits where there is no cap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def cross_entropy_of(
    logits: Tensor, targets: Tensor, *, z_loss: float = 0.0, softcap: float | None = None
) -> Loss:
    """The loss of logits ``[..., vocab]`` by the textbook, differentiated by autograd.

    For a head that is not a plain linear map, and to compare with.
    """
    targets = targets.reshape(-1).long()
    logits = logits.reshape(-1, logits.shape[-1])
    logits = soft_capped(logits if logits.dtype is torch.float64 else logits.float(), softcap)
    total = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    penalty = torch.zeros_like(total)
    if z_loss:
        penalty = z_loss * logits.logsumexp(dim=1)[targets != IGNORE_INDEX].square().sum()
    return Loss(total + penalty, penalty.detach(), count_targets(targets))


def chunked_cross_entropy(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    terms: LossTerms,
    *,
    chunk_tokens: int | None = None,
    style: LossStyle,
) -> tuple[Tensor, Tensor]:
    """Loss of rows ``[tokens, hidden]`` and head ``[vocab, hidden]``, and its z-loss part.

    Products are in the type of the rows; the head's gradient is summed in f32 and given in the type of
    the head. Targets are int64 ``[tokens]``. By default chunks are those of `flops.logits_chunk`.

    Returns:
        (summed loss, z-loss included; the z-loss part of it, without a graph), both f32.
    """
    chunk = chunk_tokens or logits_chunk(rows.shape[0], weight.shape[0], rows.element_size())
    plan = _Plan(terms=terms, chunk_tokens=chunk, gradients=torch.is_grad_enabled(), style=style)
    return _ChunkedCrossEntropy.apply(rows, weight, targets, plan)  # type: ignore[no-any-return,no-untyped-call]


@dataclass(frozen=True)
class _Plan:
    terms: LossTerms
    chunk_tokens: int
    gradients: bool
    style: LossStyle


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradients together, one chunk of tokens after another."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        wants_rows = plan.gradients and rows.requires_grad
        wants_weight = plan.gradients and weight.requires_grad
        total = torch.zeros(2, dtype=torch.float32, device=rows.device)
        d_rows = torch.empty_like(rows) if wants_rows else None
        d_weight = _empty_total(weight, rows) if wants_weight else None
        head_dtype, weight, mm = gradient_dtype(weight), weight.to(rows.dtype), plan.style.mm
        for start in range(0, rows.shape[0], plan.chunk_tokens):
            chunk = slice(start, start + plan.chunk_tokens)
            logits = mm(rows[chunk], weight.t())
            wants = wants_rows or wants_weight
            total += _chunk_loss(logits, targets[chunk], plan, gradient_in_place=wants)
            if d_rows is not None:
                d_rows[chunk] = mm(logits, weight)
            if d_weight is not None:
                _accumulate(d_weight, logits, rows[chunk], mm, first=start == 0)
            del logits  # or two chunks would be alive while the next is made
        ctx.may_wait = plan.style.may_wait
        ctx.gradients = (d_rows, None if d_weight is None else d_weight.to(head_dtype))
        loss, penalty = total.unbind()
        penalty = penalty.clone()  # an output of its own, no view of the other's memory
        ctx.mark_non_differentiable(penalty)
        return loss + penalty, penalty

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were already handed on by an earlier backward")
        gradients, ctx.gradients = ctx.gradients, None
        if not ctx.may_wait or upstream.item() != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(upstream)
        return *gradients, None, None


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """Type of a weight's gradient: the one it asks for (``grad_dtype``), else its own."""
    asked = weight.grad_dtype if weight.is_leaf else None
    return asked or weight.dtype


def _chunk_loss(logits: Tensor, targets: Tensor, plan: _Plan, *, gradient_in_place: bool) -> Tensor:
    """Summed f32 cross-entropy and z-loss ``[2]`` of ``[tokens, vocab]`` logits.

    The logits become their own gradient where asked; else nothing is left of them.
    """
    rows, z_loss = logits.shape[0], plan.terms.z_loss
    if plan.style.pass_bytes is not None:
        rows = max(1, plan.style.pass_bytes // (4 * logits.shape[1]))
    total = torch.zeros(2, dtype=torch.float32, device=logits.device)
    parts = zip(torch.split(logits, rows), torch.split(targets, rows), strict=True)
    for part, part_targets in parts:
        wide = part.float()
        slope = _cap(wide, plan.terms.softcap)
        if gradient_in_place:
            total += _to_gradient(wide, part_targets, z_loss, may_wait=plan.style.may_wait)
            if slope is not None:
                wide.mul_(slope)
            if wide is not part:
                part.copy_(wide)
        else:
            chosen = _target_logits(wide, part_targets)
            total += _sum_loss(_log_sum_exp(wide), chosen, part_targets, z_loss)
    return total


def _cap(logits: Tensor, softcap: float | None) -> Tensor | None:
    """Cap f32 logits in place (`soft_capped`); returns the derivative, None where there is no cap."""
    if softcap is None:
        return None
    slope = 1.0 - logits.div_(softcap).tanh_().square()
    logits.mul_(softcap)
    return slope


def _to_gradient(logits: Tensor, targets: Tensor, z_loss: float, *, may_wait: bool) -> Tensor:
    """As `_sum_loss`; the f32 logits become its gradient in place: ``softmax (1 + 2 z lse) - onehot``."""
    chosen = _target_logits(logits, targets)
    lse = _log_sum_exp(logits)
    counts = targets != IGNORE_INDEX
    if z_loss or not may_wait or not bool(counts.all()):
        logits.mul_((counts * (1.0 + 2.0 * z_loss * lse)).unsqueeze(1))
    logits.scatter_add_(1, targets.clamp(min=0).unsqueeze(1), -counts.to(logits.dtype).unsqueeze(1))
    return _sum_loss(lse, chosen, targets, z_loss)


def _log_sum_exp(logits: Tensor) -> Tensor:
    """``[tokens]``; the f32 logits become their softmax in place, in fewer passes than `torch.logsumexp`."""
    largest = logits.amax(dim=1)
    torch.softmax(logits, dim=1, out=logits)
    # The largest probability is at least 1 / vocab, so its logarithm is exact where the target's may not be.
    return largest - logits.amax(dim=1).log_()


def _target_logits(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)


def _sum_loss(lse: Tensor, chosen: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    """``[2]``: summed cross-entropy, and what z-loss adds to it."""
    loss = torch.stack((lse - chosen, z_loss * lse.square()))
    return loss.masked_fill_(targets == IGNORE_INDEX, 0.0).sum(1)


def _empty_total(weight: Tensor, rows: Tensor) -> Tensor:
    """f32 room for the head's gradient; zero where no chunk will write to it."""
    allocate = torch.empty if rows.shape[0] else torch.zeros
    return allocate(weight.shape, dtype=torch.float32, device=weight.device)


def _accumulate(
    total: Tensor,
    d_logits: Tensor,
    rows: Tensor,
    mm: Callable[[Tensor, Tensor], Tensor],
    *,
    first: bool,
) -> None:
    """Add ``d_logits.T @ rows`` to the f32 ``[vocab, hidden]`` total, or make it that.

    A block of the vocabulary at a time, or the product's own copy of all logits would be the largest
    temporary of a step.
    """
    for start in range(0, total.shape[0], HEAD_GRADIENT_ROWS):
        block = slice(start, start + HEAD_GRADIENT_ROWS)
        product = mm(d_logits[:, block].t(), rows)
        if first:
            total[block] = product
        else:
            total[block] += product
        del product  # or two blocks of it would be alive
