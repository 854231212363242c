"""AdamW whose moments take a byte an element, and four for 256 of them: bitsandbytes over local elements.

A moment of a large matrix is kept as codes of a byte, each standing for a share of the largest magnitude in
its block of 256 elements (Dettmers et al. 2021, arXiv:2110.02861). bitsandbytes computes the update; this
module gives it what a rank holds, whatever the strategy made of the parameter, and leaves the weights alone
when a step is not to be taken, neither of which the library's own optimizer does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from apr_dist.model.quantized import bitsandbytes
from apr_dist.parallel.sharded import held_here
from apr_dist.parallel.state_bits import BLOCK, FLAG

Empty = Callable[[int, torch.dtype], Tensor]
"""Allocates a flat tensor."""


def _empty(count: int, kind: torch.dtype, *, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=kind, device=device)


@dataclass(frozen=True)
class Quantized:
    """Elements as codes, in blocks of 256 from the first on.

    Attributes:
        codes: uint8 ``[n]``.
        scales: f32 ``[ceil(n / 256)]``, the largest magnitude in each block.
        values: f32 ``[256]``, the share of its scale that each code stands for.
    """

    codes: Tensor
    scales: Tensor
    values: Tensor

    @classmethod
    def zeros(
        cls, count: int, device: torch.device, *, signed: bool, empty: Empty | None = None
    ) -> Quantized:
        """That many zeros, on the device or where ``empty`` allocates; code values are on the device."""
        allocate = empty or functools.partial(_empty, device=device)
        codes, scales = allocate(count, torch.uint8), allocate(-(-count // BLOCK), torch.float32)
        return cls(codes.zero_(), scales.zero_(), code_values(signed=signed).to(device))

    def blocks(self, number: int, of: int) -> tuple[int, Tensor, Tensor]:
        """One of ``of`` nearly equal parts: its first element's place here, its codes, its scales."""
        each = -(-len(self.scales) // of)
        first, last = (min(one * each, len(self.scales)) for one in (number, number + 1))
        codes = self.codes[first * BLOCK : last * BLOCK]
        return min(first * BLOCK, len(self.codes)), codes, self.scales[first:last]

    def take(self, codes: Tensor, scales: Tensor, floats: Tensor) -> None:
        """Hold these elements instead: the very codes where a block's all had one scale, else the nearest.

        Args:
            codes: uint8 ``[n]``.
            scales: f32 ``[n]``, the scale each was stored with; NaN where none was.
            floats: f32 ``[n]``, what the elements are.
        """
        if not self.codes.numel():
            return
        pad = -len(codes) % BLOCK
        by_block = torch.nn.functional.pad(scales[None], (0, pad), mode="replicate").view(-1, BLOCK)
        stored = by_block[:, 0]
        kept = (by_block == stored[:, None]).all(1)
        if not bool(kept.all()):
            library = _library().functional
            nearest, state = library.quantize_blockwise(floats, code=self.values.cpu(), blocksize=BLOCK)
            codes = torch.where(kept.repeat_interleave(BLOCK)[: len(codes)], codes, nearest)
            stored = torch.where(kept, stored, state.absmax)
        self.codes.copy_(codes)
        self.scales.copy_(stored)


@cache
def code_values(*, signed: bool) -> Tensor:
    """What each of the 256 codes stands for, as a share of its block's scale; f32 on the CPU."""
    values: Tensor = _library().functional.create_dynamic_map(signed=signed)
    return values.float()


class AdamW8bit(torch.optim.Optimizer):
    """AdamW over groups that say ``state_bits`` 8 or 32; see the module.

    Has ``found_inf`` like PyTorch's fused AdamW: a step is left out where it is set. On a GPU each step waits
    for that answer.

    Args:
        groups: of parameters, with ``weight_decay`` and ``state_bits``.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the root of the second.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self._has_codes = any(group["state_bits"] == 8 for group in groups)
        self._allocate: Empty | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, unless ``found_inf`` is set."""
        if self.found_inf is not None and bool(self.found_inf):
            return
        for group, weight in self._all():
            if weight.grad is None:
                continue
            if not self.state[weight]:
                self.state[weight] = self.blank(weight, updates=0)
            self._step_one(group, weight, self.state[weight])

    def blank(self, weight: Tensor, *, updates: int) -> dict[str, Any]:
        """A parameter's state before its moments have values: of this rank's elements, flat."""
        bits = next(group["state_bits"] for group, other in self._all() if other is weight)
        elements = flat(weight)
        state: dict[str, Any] = {"step": updates}
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            count, device, empty = elements.numel(), elements.device, self._allocate
            state[name] = (
                Quantized.zeros(count, device, signed=signed, empty=empty)
                if bits == 8
                else (empty or functools.partial(_empty, device=device))(count, torch.float32).zero_()
            )
        return state

    def _all(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        return ((group, weight) for group in self.param_groups for weight in group["params"])

    def _step_one(self, group: dict[str, Any], weight: Tensor, state: dict[str, Any]) -> None:
        state["step"] += 1
        values, gradient = flat(weight), flat(weight.grad)
        if values.numel():
            self._compute(group, values, gradient, state["exp_avg"], state["exp_avg_sq"], state["step"])

    def _compute(
        self,
        group: dict[str, Any],
        values: Tensor,
        gradient: Tensor,
        first: Tensor | Quantized,
        second: Tensor | Quantized,
        step: int,
    ) -> None:
        """Update f32 values and their moments in place."""
        beta1, beta2 = group["betas"]
        same = {"step": step, "lr": group["lr"], "weight_decay": group["weight_decay"]}
        same |= {"beta1": beta1, "beta2": beta2, "eps": group["eps"]}
        library = _library().functional
        if isinstance(first, Tensor) or isinstance(second, Tensor):
            library.optimizer_update_32bit("adam", gradient, values, first, state2=second, **same)
            return
        library.optimizer_update_8bit_blockwise(
            "adam",
            gradient,
            values,
            first.codes,
            second.codes,
            beta3=0.0,
            alpha=0.0,
            qmap1=first.values,
            qmap2=second.values,
            absmax1=first.scales,
            absmax2=second.scales,
            **same,
        )


def flat(parameter: Tensor | None) -> Tensor:
    """The elements of a parameter, or of its gradient, that this rank holds: a flat view."""
    assert parameter is not None
    return held_here(parameter).detach().view(-1)


def _library() -> Any:
    """bitsandbytes, for 8-bit moments."""
    return bitsandbytes(FLAG)
