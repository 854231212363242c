"""AdamW over two groups: matrices decay, norms and biases do not; the scheduled rate is the rate."""

from __future__ import annotations

import torch
from torch import nn

from apr_dist.errors import WeightsRefused
from apr_dist.parallel.sharding import whole_shape


def build_optimizer(
    model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) with decay on tensors of two or more dimensions only.

    Uses torch's fused kernel, which exists for CPU and CUDA and updates each element in one pass.

    Raises:
        WeightsRefused: a trainable parameter is in no group or in two.
    """
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    matrices = [weight for weight in parameters if len(whole_shape(weight)) >= 2]
    vectors = [weight for weight in parameters if len(whole_shape(weight)) < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=lr,
        betas=betas,
        eps=eps,
        fused=True,
    )
    assert_each_parameter_once(model, optimizer)
    return optimizer


def assert_each_parameter_once(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Every trainable parameter object is in exactly one optimizer group (ties count once).

    Raises:
        WeightsRefused: naming how many are missing or doubled.
    """
    held = [id(weight) for group in optimizer.param_groups for weight in group["params"]]
    wanted = {id(weight) for weight in model.parameters() if weight.requires_grad}
    if len(held) != len(set(held)) or set(held) != wanted:
        raise WeightsRefused(
            f"the optimizer holds {len(held)} parameters ({len(set(held))} distinct)",
            expected=f"each of the model's {len(wanted)} trainable parameters exactly once",
            remedy="report this: a weight would be trained twice or never",
            falsifier="FALSIFY-APR-DIST-TRAINER-002",
        )


def apply_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Set the rate of every group and return the one the optimizer will really use."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return float(optimizer.param_groups[0]["lr"])
