"""Optimizer state as runs of whole tensors by parameter name, wherever the strategy keeps its parts.

Each rank gives and takes only what it holds; nothing travels here. Files are the business of ``state``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from apr_dist.choices import Strategy
from apr_dist.model.adapters import canonical
from apr_dist.parallel.eight_bit import AdamW8bit, Quantized
from apr_dist.parallel.heartbeat import HERE
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.shard_layout import Piece, local, span, whole_shape

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's two moments, each of its parameter's shape."""

STEP = "step"
"""AdamW's counter of updates, the same for every parameter."""

SCALES = ".scales"
"""What the name of a moment in 8 bits is followed by, for the scales of its blocks."""


class Stored(Protocol):
    """Moments by name, from wherever they were saved."""

    def read(self, name: str, start: int, values: Tensor) -> None:
        """Fill flat f32 ``values`` with ``NAME.exp_avg`` or ``NAME.exp_avg_sq`` from that element on."""

    def read_quantized(self, name: str, start: int, held: Quantized) -> None:
        """The same into blocks of codes."""


def trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters that have moments, by name: those that are not frozen."""
    return ((canonical(name), weight) for name, weight in model.named_parameters() if weight.requires_grad)


def moment_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every moment of a model by name, with the shape of the whole tensor."""
    return {f"{name}.{key}": whole_shape(weight) for name, weight in trained(model) for key in MOMENTS}


def updates_done(optimizer: torch.optim.Optimizer) -> int:
    """How many updates the optimizer's state has seen; 0 where there is none yet."""
    return next((int(state[STEP]) for state in optimizer.state.values() if STEP in state), 0)


def moment_pieces(model: nn.Module, optimizer: torch.optim.Optimizer, runtime: Runtime) -> Iterator[Piece]:
    """This rank's share of every moment, as views; over all ranks each element comes exactly once.

    Where ranks hold copies of the same elements, each gives another part of them. Empty before a step.
    """
    if not updates_done(optimizer):
        return
    pieces = _zero_pieces if runtime.strategy.zero_stage else _torch_pieces
    yield from pieces(model, optimizer, runtime)


def _torch_pieces(model: nn.Module, optimizer: torch.optim.Optimizer, runtime: Runtime) -> Iterator[Piece]:
    copy, copies = runtime.rank // runtime.shard_size, runtime.world_size // runtime.shard_size
    for name, weight in trained(model):
        shape = whole_shape(weight)
        start, _ = span(shape, runtime, runtime.rank)
        for key in MOMENTS:
            held = optimizer.state[weight][key]
            if isinstance(held, Quantized):
                at, codes, scales = held.blocks(copy, copies)
                yield Piece(f"{name}.{key}", shape, start + at, codes)
                yield Piece(f"{name}.{key}{SCALES}", shape, start + at, scales)
            else:
                yield Piece(f"{name}.{key}", shape, start, local(held, runtime)).part(copy, copies)


def _zero_pieces(model: nn.Module, optimizer: torch.optim.Optimizer, runtime: Runtime) -> Iterator[Piece]:
    from deepspeed.utils import safe_get_local_optimizer_state  # noqa: PLC0415  (slow, rarely needed)

    if runtime.strategy is not Strategy.ZERO3:
        _link(optimizer)
    for name, weight in trained(model):
        shape = whole_shape(weight)
        for key in MOMENTS:
            if runtime.strategy is Strategy.ZERO3:
                begin, end = span(shape, runtime, runtime.rank)
                values = safe_get_local_optimizer_state(weight, key).detach().view(-1)[: end - begin]
                yield Piece(f"{name}.{key}", shape, begin, values)
            elif (held := fragment(weight)) is not None:
                values = held.get_hp_fragment(key).detach().view(-1)
                yield Piece(f"{name}.{key}", shape, held.lp_fragment_address.start, values)


def fragment(weight: Tensor) -> Any:
    """Where ZeRO-1 and -2 keep this rank's part of a parameter's state; None: it has no part."""
    return getattr(weight, "_hp_mapping")  # noqa: B009  (DeepSpeed's, unknown to the type checker)


def fill_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, updates: int, stored: Stored, runtime: Runtime
) -> None:
    """Give an optimizer without state the moments that are stored; each rank takes its own part.

    Args:
        model: the decoder whose parameters the optimizer holds.
        optimizer: AdamW, or DeepSpeed's wrapper of it.
        updates: what the optimizer's counter says.
        stored: fills tensors in host memory.
        runtime: this rank's view of the run.
    """
    if runtime.strategy.zero_stage:
        _fill_zero(model, optimizer, updates, stored, runtime)
        return
    for name, weight in trained(model):
        start, _ = span(whole_shape(weight), runtime, runtime.rank)
        state = _blank(optimizer, weight, updates)
        for key in MOMENTS:
            if isinstance(state[key], Quantized):
                stored.read_quantized(f"{name}.{key}", start, state[key])
            else:
                _take(stored, f"{name}.{key}", start, local(state[key], runtime))
            HERE.moved()
        optimizer.state[weight] = state


def _blank(optimizer: torch.optim.Optimizer, weight: Tensor, updates: int) -> dict[str, Any]:
    if isinstance(optimizer, AdamW8bit):
        return optimizer.blank(weight, updates=updates)
    # Fused AdamW keeps its step counter beside the weights.
    state = {STEP: torch.tensor(float(updates), dtype=torch.float32, device=weight.device)}
    for key in MOMENTS:
        state[key] = torch.zeros_like(weight.detach(), memory_format=torch.contiguous_format)
    return state


def _take(stored: Stored, name: str, start: int, values: Tensor) -> None:
    if values.device.type == "cpu":
        stored.read(name, start, values)
        return
    on_host = torch.empty(values.shape, dtype=values.dtype)
    stored.read(name, start, on_host)
    values.copy_(on_host)


def _fill_zero(
    model: nn.Module, optimizer: torch.optim.Optimizer, updates: int, stored: Stored, runtime: Runtime
) -> None:
    from deepspeed.utils import safe_set_local_optimizer_state  # noqa: PLC0415  (slow, rarely needed)

    counts_in_tensors = isinstance(getattr(optimizer, "optimizer"), torch.optim.AdamW)  # noqa: B009
    for part in flat_parts(optimizer, runtime):
        state: dict[str, Any] = {key: torch.zeros_like(part.detach()) for key in MOMENTS}
        counter = torch.tensor(float(updates), dtype=torch.float32, device=part.device)
        state[STEP] = counter if counts_in_tensors else updates
        optimizer.state[part] = state
    if runtime.strategy is not Strategy.ZERO3:
        _link(optimizer)
    for name, weight in trained(model):
        for key in MOMENTS:
            HERE.moved()
            if runtime.strategy is Strategy.ZERO3:
                begin, end = span(whole_shape(weight), runtime, runtime.rank)
                padded = torch.zeros(weight.ds_tensor.ds_numel)  # type: ignore[attr-defined]
                stored.read(f"{name}.{key}", begin, padded[: end - begin])
                safe_set_local_optimizer_state(weight, padded, key)
            elif (held := fragment(weight)) is not None:
                start, values = held.lp_fragment_address.start, held.get_hp_fragment(key)
                _take(stored, f"{name}.{key}", start, values.detach().view(-1))


def flat_parts(optimizer: torch.optim.Optimizer, runtime: Runtime) -> list[Tensor]:
    """This rank's flat f32 partitions, by which DeepSpeed's inner optimizer keeps its state."""
    stage3 = runtime.strategy is Strategy.ZERO3
    parts: list[Tensor] = getattr(
        optimizer, "fp32_partitioned_groups_flat" if stage3 else "single_partition_of_fp32_groups"
    )
    return parts


def _link(optimizer: torch.optim.Optimizer) -> None:
    """Tie parameters to their moments again.

    ZeRO-1 and -2 do it once, after the first group's first step, when the other groups have none yet.
    """
    optimizer._hp_optimizer_states_linked = False  # type: ignore[attr-defined]
    optimizer._lazy_init_hp_params_optimizer_state()  # type: ignore[attr-defined]
