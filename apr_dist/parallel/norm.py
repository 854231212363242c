"""The global norm of gradients, whatever parts they come in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apr_dist.parallel.runtime import Runtime

NORM_BLOCK = 1024
"""Elements whose squares are added in f32."""


def global_norm(gradients: Sequence[Tensor], runtime: Runtime) -> Tensor:
    """L2 norm of all gradients over all ranks, each giving its parts; f64, on their device; a collective.

    On the CPU squares are added in f32 within short blocks and in f64 between them, so that the norm does not
    depend on how tensors are cut (DeepSpeed adds in f64 too); no f64 copy of a gradient is made. On a GPU
    they are added in f32 within a tensor, by few kernels for all of them.
    """
    if gradients[0].device.type == "cpu":
        return norm_of([squares_of(one) for one in gradients], runtime)
    return norm_of([_squares_at_once(gradients)], runtime)


def norm_of(squares: Sequence[Tensor], runtime: Runtime) -> Tensor:
    """The norm whose squared parts, each ``[n]`` f64, these are, in their order; a collective."""
    if squares[0].device.type == "cpu":
        total = torch.zeros((), dtype=torch.float64)
        for part in torch.cat(list(squares)).unbind():  # one after another, as the norm always did
            total += part
    else:
        total = torch.cat(list(squares)).sum()
    # Ranks that hold copies of the same parts all add them.
    copies = runtime.world_size // runtime.shard_size
    if runtime.shard_size > 1:
        total = runtime.sum(total.to(runtime.device)).to(total.device) / copies
    return total.sqrt()


def squares_of(gradient: Tensor) -> Tensor:
    """The parts of one gradient's squared norm, f64 ``[n]``."""
    if gradient.device.type != "cpu":
        return _squares_at_once([gradient])
    flat = gradient.detach().reshape(-1)
    blocks = flat.numel() // NORM_BLOCK * NORM_BLOCK
    parts = (flat[:blocks].view(-1, NORM_BLOCK), flat[blocks:].view(1, -1))
    norms = (torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in parts)
    return torch.stack([norm.double().square().sum() for norm in norms])


def _squares_at_once(gradients: Sequence[Tensor]) -> Tensor:
    filled = [gradient.detach() for gradient in gradients if gradient.numel()]  # a shard may be empty
    if not filled:
        return torch.zeros(1, dtype=torch.float64, device=gradients[0].device)
    return torch.stack(torch._foreach_norm(filled, dtype=torch.float32)).double().square()
