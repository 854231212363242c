"""Optimizer state as whole tensors by parameter name, wherever the strategy keeps its parts.

One tensor at a time travels, so a rank needs room for its part and one whole tensor. Files are the
business of ``state``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.sharding import whole_shape

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's two moments, each of its parameter's shape."""


def whole_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, runtime: Runtime
) -> Iterator[tuple[str, Tensor]]:
    """Every moment and step counter as (``NAME.exp_avg``, ``NAME.exp_avg_sq``, ``NAME.step``; f32 values).

    A collective where optimizer state is sharded: every rank takes every item. Empty before a step.
    """
    whole = _whole_zero if runtime.strategy.zero_stage else _whole_torch
    if runtime.strategy.zero_stage in (1, 2) and optimizer.state:
        # DeepSpeed ties parameters to their moments once, after the first group's first step, when the
        # other groups have none yet.
        optimizer._hp_optimizer_states_linked = False  # type: ignore[attr-defined]
        optimizer._lazy_init_hp_params_optimizer_state()  # type: ignore[attr-defined]
    for name, weight in model.named_parameters():
        for key in (*MOMENTS, "step"):
            value = whole(optimizer, weight, key)
            if value is None:
                return
            yield f"{name}.{key}", value


def _whole_torch(optimizer: torch.optim.Optimizer, weight: nn.Parameter, key: str) -> Tensor | None:
    value = optimizer.state.get(weight, {}).get(key)
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return None if value is None else value.detach()


def _whole_zero(optimizer: torch.optim.Optimizer, weight: nn.Parameter, key: str) -> Tensor | None:
    from deepspeed.utils import safe_get_full_optimizer_state  # noqa: PLC0415  (slow, rarely needed)

    states = optimizer.state
    if not states:
        return None
    if key == "step":
        return next(
            torch.as_tensor(state["step"], dtype=torch.float32).detach().clone() for state in states.values()
        )
    value: Tensor = safe_get_full_optimizer_state(weight, key)
    return value.detach().reshape(whole_shape(weight))
