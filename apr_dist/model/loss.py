"""Cross-entropy over the vocabulary without holding the logits: the entry, and who computes it.

``plain_cross_entropy_sum`` is the same loss by the textbook, with all logits, to compare with.
"""

from __future__ import annotations

import importlib
from enum import StrEnum
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from apr_dist.errors import UsageError
from apr_dist.model.chunked_loss import IGNORE_INDEX, chunked_cross_entropy
from apr_dist.model.layers import compute_dtype


class LossBackend(StrEnum):
    """Implementations of the linear cross-entropy.

    ``chunked``: this project's. ``torch``: ``torch.nn.functional.linear_cross_entropy``, where the
    installed PyTorch has it. ``liger``: the Liger kernel, on CUDA with the extra ``liger``.
    """

    CHUNKED = "chunked"
    TORCH = "torch"
    LIGER = "liger"


def choose_loss_backend(device: torch.device, *, z_loss: float = 0.0) -> LossBackend:
    """The implementation for a device: Liger on CUDA where it is installed, else the project's own.

    With z-loss it is the project's own, which reports the loss with and without it.

    PyTorch's own is never chosen unasked: it has no z-loss, and on the CPU it took nine times as long
    (`benchmarks/bench_loss.py`).
    """
    if device.type == "cuda" and not z_loss and find_spec("liger_kernel") is not None:
        return LossBackend.LIGER
    return LossBackend.CHUNKED


def cross_entropy_sum(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
    backend: LossBackend | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of ``softmax(hidden @ head_weight.T)`` against the targets.

    Args:
        hidden: ``[..., hidden]``.
        head_weight: ``[vocab, hidden]``.
        targets: integers ``[...]``; -100 does not count.
        z_loss: weight of ``logsumexp(logits)^2``, added per token (PaLM, arXiv:2204.02311, section 5).
        chunk_tokens: tokens per chunk; by default equal chunks of at most 128 MB (`flops.logits_chunk`).
        backend: who computes; by default `choose_loss_backend` decides.

    Returns:
        (sum in nats, f32; number of targets that count, int64).

    Raises:
        UsageError: z-loss asked of ``torch``, which has none.
    """
    total, _, count = cross_entropy_parts(
        hidden, head_weight, targets, z_loss=z_loss, chunk_tokens=chunk_tokens, backend=backend
    )
    return total, count


def cross_entropy_parts(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
    backend: LossBackend | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cross_entropy_sum`, with what z-loss added.

    Returns:
        (sum in nats, z-loss included; the z-loss part of it, without a graph; number of targets). Liger
        does not tell the part apart: it is NaN there when z-loss is asked for.
    """
    targets = targets.reshape(-1).long()
    count = (targets != IGNORE_INDEX).sum()
    none = torch.zeros((), dtype=torch.float32, device=hidden.device)
    dtype = compute_dtype(hidden)
    rows = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    backend = backend or choose_loss_backend(hidden.device, z_loss=z_loss)
    with torch.autocast(hidden.device.type, enabled=False):
        if backend is LossBackend.TORCH:
            return _torch_loss(rows, head_weight.to(dtype), targets, z_loss), none, count
        if backend is LossBackend.LIGER:
            unknown = none.fill_(float("nan")) if z_loss else none
            return _liger_loss(rows, head_weight.to(dtype), targets, z_loss), unknown, count
        total, part = chunked_cross_entropy(
            rows, head_weight, targets, z_loss=z_loss, chunk_tokens=chunk_tokens
        )
    return total, part, count


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


def _torch_loss(rows: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    if z_loss:
        raise UsageError(
            f"z_loss is {z_loss} with the loss backend torch",
            expected="0, because torch's linear_cross_entropy has no z-loss",
            remedy="choose the loss backend chunked",
        )
    functional: Any = F
    total = functional.linear_cross_entropy(
        rows,
        weight,
        targets,
        reduction="sum",
        ignore_index=IGNORE_INDEX,
        options=torch.nn.LinearCrossEntropyOptions(),
    )
    return cast(Tensor, total).float()


def _liger_loss(rows: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    liger = importlib.import_module("liger_kernel.transformers")
    compute = liger.LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORE_INDEX, lse_square_scale=z_loss, reduction="sum", accum_dtype=torch.float32
    )
    return cast(Tensor, compute(weight, rows, targets)).float()
