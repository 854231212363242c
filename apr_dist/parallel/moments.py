"""Optimizer state as whole tensors by parameter name, wherever the strategy keeps its parts.

One tensor at a time travels, so a rank needs room for its part and one whole tensor. Files are the
business of ``state``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.sharding import fill, gathered, received, whole_shape, zero3_part
from apr_dist.parallel.strategy import Strategy

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's two moments, each of its parameter's shape."""

STEP = "step"
"""AdamW's counter of updates, the same for every parameter."""

Read = Callable[[str], Tensor]
"""Gives the whole value of ``NAME.exp_avg``, ``NAME.exp_avg_sq`` or ``NAME.step``."""


def whole_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, runtime: Runtime
) -> Iterator[tuple[str, Tensor]]:
    """Every moment and step counter as (``NAME.exp_avg``, ``NAME.exp_avg_sq``, ``NAME.step``; f32 values).

    A collective where optimizer state is sharded: every rank takes every item. Empty before a step.
    """
    whole = _whole_zero if runtime.strategy.zero_stage else _whole_torch
    if runtime.strategy.zero_stage and optimizer.state:
        _link(optimizer, runtime)
    for name, weight in model.named_parameters():
        for key in (*MOMENTS, STEP):
            value = whole(optimizer, weight, key)
            if value is None:
                return
            yield f"{name}.{key}", value


def _whole_torch(optimizer: torch.optim.Optimizer, weight: nn.Parameter, key: str) -> Tensor | None:
    value = optimizer.state.get(weight, {}).get(key)
    if value is None:
        return None
    with gathered(value) as whole:  # a new tensor, or the moment itself
        return whole


def _whole_zero(optimizer: torch.optim.Optimizer, weight: nn.Parameter, key: str) -> Tensor | None:
    from deepspeed.utils import safe_get_full_optimizer_state  # noqa: PLC0415  (slow, rarely needed)

    states = optimizer.state
    if not states:
        return None
    if key == STEP:
        return next(
            torch.as_tensor(state[STEP], dtype=torch.float32).detach().clone() for state in states.values()
        )
    value: Tensor = safe_get_full_optimizer_state(weight, key)
    return value.detach().reshape(whole_shape(weight))


def fill_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, read: Read | None, runtime: Runtime
) -> None:
    """Give an optimizer without state the moments and counters that rank 0 reads; a collective.

    Args:
        model: the decoder whose parameters the optimizer holds.
        optimizer: AdamW, or DeepSpeed's wrapper of it.
        read: on rank 0; None elsewhere.
        runtime: this rank's view of the run.
    """
    if runtime.strategy.zero_stage:
        _fill_zero(model, optimizer, read, runtime)
        return
    for name, weight in model.named_parameters():
        like = weight.detach()
        moments = {key: torch.zeros_like(like, memory_format=torch.contiguous_format) for key in MOMENTS}
        # Fused AdamW keeps its step counter beside the weights.
        moments[STEP] = torch.zeros((), dtype=torch.float32, device=weight.device)
        for key, value in moments.items():
            fill(value, None if read is None else read(f"{name}.{key}"), runtime)
        optimizer.state[weight] = moments


def _fill_zero(
    model: nn.Module, optimizer: torch.optim.Optimizer, read: Read | None, runtime: Runtime
) -> None:
    from deepspeed.utils import (  # noqa: PLC0415  (slow, rarely needed)
        safe_set_full_optimizer_state,
        safe_set_local_optimizer_state,
    )

    weights = dict(model.named_parameters())
    first = next(iter(weights))
    counter = received((), None if read is None else read(f"{first}.{STEP}"), runtime)
    for part in flat_parts(optimizer, runtime):
        optimizer.state[part] = {key: torch.zeros_like(part.detach()) for key in MOMENTS}
        optimizer.state[part][STEP] = counter.clone()
    _link(optimizer, runtime)
    for name, weight in weights.items():
        for key in MOMENTS:
            whole = received(whole_shape(weight), None if read is None else read(f"{name}.{key}"), runtime)
            if runtime.strategy is Strategy.ZERO3:
                part = zero3_part(whole, weight, runtime)
                safe_set_local_optimizer_state(weight, part, key)
            else:
                safe_set_full_optimizer_state(weight, whole, key)


def flat_parts(optimizer: torch.optim.Optimizer, runtime: Runtime) -> list[Tensor]:
    """This rank's flat f32 partitions, by which DeepSpeed's inner optimizer keeps its state."""
    stage3 = runtime.strategy is Strategy.ZERO3
    parts: list[Tensor] = getattr(
        optimizer, "fp32_partitioned_groups_flat" if stage3 else "single_partition_of_fp32_groups"
    )
    return parts


def _link(optimizer: torch.optim.Optimizer, runtime: Runtime) -> None:
    """Tie parameters to their moments anew.

    ZeRO-1 and -2 do it once, after the first group's first step, when the other groups have none yet.
    """
    if runtime.strategy is not Strategy.ZERO3:
        optimizer._hp_optimizer_states_linked = False  # type: ignore[attr-defined]
        optimizer._lazy_init_hp_params_optimizer_state()  # type: ignore[attr-defined]
