"""Which share of weight updates rounding swallowed, measured on a sample of every tensor.

The update that AdamW computes for an element is worked out again in f64 from its moments. It is below half a
unit in the last place of the stored weight, or it is not; and the stored weight is another one afterwards, or
it is not. An update of exactly nothing, such as that of a token's row that was never seen, is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apr_dist.parallel.eight_bit import Quantized, flat
from apr_dist.parallel.optimizer_shards import MOMENTS, STEP, trained
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.split_weights import split_of
from apr_dist.parallel.state_bits import BLOCK

SAMPLE = 4096
"""Elements of a tensor that are looked at, evenly spread over what a rank owns."""

_BITS = {torch.float32: 24, torch.bfloat16: 8}
"""Bits of the fraction, the leading one included."""


@dataclass(frozen=True, kw_only=True)
class LostUpdates:
    """Shares of the updates of one step.

    Attributes:
        below_half_ulp: smaller than half a unit in the last place of the weight.
        unchanged: after which the stored weight was what it was before.
    """

    below_half_ulp: float
    unchanged: float

    def to_json(self) -> dict[str, float]:
        """The shares as plain JSON values."""
        return asdict(self)


class UpdateSample:
    """Looks at a sample of all trained weights before a step and after it.

    Args:
        model: the decoder that is trained.
        optimizer: of its parameters.
        runtime: this rank's view of the run.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, runtime: Runtime) -> None:
        self._model, self._optimizer, self._runtime = model, optimizer, runtime
        self._before: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def can_measure(self) -> bool:
        """Whether each weight has its own state, which under ZeRO it has not."""
        return not self._runtime.strategy.zero_stage

    def look(self) -> None:
        """Remember the sample before a step."""
        self._before.clear()
        for name, weight in trained(self._model):
            count = flat(weight).numel()
            places = torch.arange(0, count, max(1, count // SAMPLE), device=flat(weight).device)
            self._before[name] = (places, _exact(weight, places))

    @torch.no_grad()
    def compare(self) -> LostUpdates | None:
        """The shares of the step since `look`, or None where no weight was to change; a collective."""
        sums = torch.zeros(3, dtype=torch.float64)
        for group, name, weight in self._updated():
            places, before = self._before[name]
            update = _update_of(group, self._optimizer.state[weight], places, before)
            stored = weight.dtype if split_of(weight) is None else torch.float32
            half = torch.ldexp(torch.ones_like(update), before.double().frexp().exponent - _BITS[stored] - 1)
            meant = update != 0
            small = (update.abs() < half) & meant
            same = (_exact(weight, places) == before) & meant
            scale = flat(weight).numel() / max(1, len(places))
            sums += scale * torch.tensor(
                [float(one.sum()) for one in (meant, small, same)], dtype=torch.float64
            )
        self._before.clear()
        meant_all, small_all, same_all = self._runtime.sum(sums.to(self._runtime.device)).tolist()
        if not meant_all:
            return None
        return LostUpdates(below_half_ulp=small_all / meant_all, unchanged=same_all / meant_all)

    def _updated(self) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        names = {id(weight): name for name, weight in trained(self._model)}
        for group in self._optimizer.param_groups:
            for weight in group["params"]:
                if id(weight) in names and self._optimizer.state.get(weight) and flat(weight).numel():
                    yield group, names[id(weight)], weight


def _exact(weight: Tensor, places: Tensor) -> Tensor:
    split = split_of(weight)
    return flat(weight)[places].float() if split is None else split.at(places)


def _update_of(group: dict[str, Any], state: dict[str, Any], places: Tensor, before: Tensor) -> Tensor:
    """What AdamW adds to these elements, f64."""
    step, (beta1, beta2) = float(state[STEP]), group["betas"]
    first, second = (_moment(state[key], places).double() for key in MOMENTS)
    rate: float = group["lr"] / (1 - beta1**step)
    root = second.clamp(min=0).sqrt() / math.sqrt(1 - beta2**step) + group["eps"]
    decay: float = group["lr"] * group["weight_decay"]
    update: Tensor = -decay * before.double() - rate * first / root
    return update


def _moment(held: Tensor | Quantized, places: Tensor) -> Tensor:
    if isinstance(held, Tensor):
        elements = flat(held)
        return elements[places.to(elements.device)].to(places.device)
    at = places.to(held.codes.device)
    codes, scales = held.codes[at].long(), held.scales[at // BLOCK]
    values: Tensor = held.values[codes.to(held.values.device)].to(places.device)
    return values * scales.to(places.device)
