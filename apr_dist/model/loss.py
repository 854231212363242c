"""Cross-entropy over the vocabulary without holding the logits.

The head's product, the softmax and both gradients are computed for a chunk of tokens at a time in the
forward pass, so the largest temporary is one chunk of logits. ``plain_cross_entropy_sum`` is the same
loss by the textbook, for tests and for devices that want it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

from apr_dist.model.layers import compute_dtype
from apr_dist.model.matmul import mm

IGNORE_INDEX: Final = -100
"""Target of a position that does not count."""

CHUNK_BYTES: Final = 128 << 20
"""Largest chunk of f32 logits held at once."""

VOCAB_BLOCK: Final = 8192
"""Rows of the head's gradient that are computed at once when it is summed over chunks."""


def cross_entropy_sum(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of ``softmax(hidden @ head_weight.T)`` against the targets.

    Args:
        hidden: ``[..., hidden]``.
        head_weight: ``[vocab, hidden]``.
        targets: integers ``[...]``; -100 does not count.
        z_loss: weight of ``logsumexp(logits)^2``, added per token (PaLM, arXiv:2204.02311, section 5).
        chunk_tokens: tokens per chunk; by default as many as keep a chunk within ``CHUNK_BYTES``.

    Returns:
        (sum in nats, f32; number of targets that count, int64).
    """
    targets = targets.reshape(-1).long()
    count = (targets != IGNORE_INDEX).sum()
    dtype = compute_dtype(hidden)
    rows = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    chunk = chunk_tokens or max(1, CHUNK_BYTES // (4 * head_weight.shape[0]))
    plan = _Plan(z_loss=z_loss, chunk_tokens=chunk, gradients=torch.is_grad_enabled())
    with torch.autocast(hidden.device.type, enabled=False):
        total = _ChunkedCrossEntropy.apply(rows, head_weight.to(dtype), targets, plan)  # type: ignore[no-untyped-call]
    return total, count


def plain_cross_entropy_sum(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, *, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The same as `cross_entropy_sum` with all logits at once, differentiated by autograd."""
    targets = targets.reshape(-1).long()
    counts = targets != IGNORE_INDEX
    logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), head_weight).float()
    total = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    if z_loss:
        total = total + z_loss * logits.logsumexp(dim=1)[counts].square().sum()
    return total, counts.sum()


@dataclass(frozen=True)
class _Plan:
    z_loss: float
    chunk_tokens: int
    gradients: bool


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradients together, one chunk of tokens after another."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, plan: _Plan) -> Tensor:
        wants_rows = plan.gradients and rows.requires_grad
        wants_weight = plan.gradients and weight.requires_grad
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        d_rows = torch.empty_like(rows) if wants_rows else None
        d_weight = None
        for start in range(0, rows.shape[0], plan.chunk_tokens):
            chunk = slice(start, start + plan.chunk_tokens)
            logits = mm(rows[chunk], weight.t()).float()
            if not (wants_rows or wants_weight):
                total += _chunk_loss(logits, targets[chunk], plan.z_loss)
                continue
            total += _chunk_loss_and_gradient(logits, targets[chunk], plan.z_loss)
            d_logits = logits.to(rows.dtype)
            if d_rows is not None:
                d_rows[chunk] = mm(d_logits, weight)
            if wants_weight:
                d_weight = _accumulate(d_weight, d_logits, rows[chunk])
        ctx.gradients = (d_rows, None if d_weight is None else d_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were already handed on by an earlier backward")
        gradients, ctx.gradients = ctx.gradients, None
        if upstream.device.type != "cpu" or upstream.item() != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(upstream)
        return *gradients, None, None


def _chunk_loss(logits: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    """Summed loss of f32 logits ``[tokens, vocab]``, which are left as they are."""
    return _sum_loss(logits.logsumexp(dim=1), _target_logits(logits, targets), targets, z_loss)


def _chunk_loss_and_gradient(logits: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    """Summed loss; the logits become its gradient in place: ``softmax (1 + 2 z lse) - onehot``."""
    chosen = _target_logits(logits, targets)
    largest = logits.amax(dim=1)
    torch.softmax(logits, dim=1, out=logits)
    # The largest probability is at least 1 / vocab, so its logarithm is exact where the target's may not be.
    lse = largest - logits.amax(dim=1).log_()
    counts = targets != IGNORE_INDEX
    if z_loss or logits.device.type != "cpu" or not bool(counts.all()):
        logits.mul_((counts * (1.0 + 2.0 * z_loss * lse)).unsqueeze(1))
    logits.scatter_add_(1, targets.clamp(min=0).unsqueeze(1), -counts.to(logits.dtype).unsqueeze(1))
    return _sum_loss(lse, chosen, targets, z_loss)


def _target_logits(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)


def _sum_loss(lse: Tensor, chosen: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    loss = lse - chosen
    if z_loss:
        loss = loss + z_loss * lse.square()
    return loss.masked_fill_(targets == IGNORE_INDEX, 0.0).sum()


def _accumulate(total: Tensor | None, d_logits: Tensor, rows: Tensor) -> Tensor:
    """Add ``d_logits.T @ rows`` to the f32 ``[vocab, hidden]`` total, a block of the vocabulary at a time."""
    if total is None:
        return mm(d_logits.t(), rows).float()
    for start in range(0, total.shape[0], VOCAB_BLOCK):
        block = slice(start, start + VOCAB_BLOCK)
        total[block] += mm(d_logits[:, block].t(), rows)
    return total
