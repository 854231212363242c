"""AdamW over weights that are stored in fewer bits, and over state that is in host memory.

An update takes a chunk of a parameter at a time: its f32 values are put together, updated by the kernel that
f32 weights have, and taken apart again. What is in host memory comes to the device while the chunk before is
computed and leaves while the next is; nothing of it is ever on the device whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apr_dist.choices import WeightStorage
from apr_dist.model.host_copies import HostCopies, host_empty
from apr_dist.parallel.eight_bit import AdamW8bit, Quantized, flat
from apr_dist.parallel.optimizer_shards import MOMENTS
from apr_dist.parallel.rounding import key_of, round_stochastically
from apr_dist.parallel.split_weights import CHUNK, chunk, split_of
from apr_dist.parallel.state_bits import BLOCK


@dataclass(frozen=True)
class Place:
    """A parameter's name, and where in the whole tensor this rank's elements begin."""

    name: str
    start: int


@dataclass
class _Part:
    """One chunk of one parameter on its way through an update; tensors on the device."""

    group: dict[str, Any]
    weight: Tensor
    number: int
    gradient: Tensor
    low: Tensor | None
    first: Tensor | Quantized
    second: Tensor | Quantized
    step: int
    home: Sequence[tuple[Tensor, Tensor]]


class StoredAdamW(AdamW8bit):
    """AdamW over f32, split or bf16 parameters; see the module.

    Args:
        groups: of parameters, with ``weight_decay`` and ``state_bits``.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the root of the second.
        storage: how bf16 parameters are rounded after an update, those that are not split.
        seed: of rounding at random.
        places: of every parameter, by its ``id``.
        device: where updates are computed.
        offloaded: whether gradients, low bits and moments are in host memory.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        storage: WeightStorage,
        seed: int,
        places: Mapping[int, Place],
        device: torch.device,
        offloaded: bool,
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps)
        self._storage, self.seed, self.places = storage, seed, places
        self._copies = HostCopies(device) if offloaded else None
        if offloaded:
            self._allocate = functools.partial(host_empty, device=device)
        self.share: Tensor | None = None
        self.gradient_of: Callable[[Tensor], Tensor | None] = lambda weight: weight.grad

    @property
    def updates(self) -> int:
        """Updates done."""
        return next((int(state["step"]) for state in self.state.values() if "step" in state), 0)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, times ``share``, unless ``found_inf`` is set."""
        if self.found_inf is not None and bool(self.found_inf):
            return
        if self._copies is None:
            for part in self._parts():
                self._update_part(part)
            return
        self._copies.begin()
        coming: _Part | None = None
        for part in self._parts():
            if coming is not None:
                self._update_part(coming)
            coming = part
        if coming is not None:
            self._update_part(coming)
        self._copies.finish()

    def _parts(self) -> Iterator[_Part]:
        """Every chunk of every parameter in order, brought to the device as it is asked for."""
        for group, weight in self._all():
            gradient = self.gradient_of(weight)
            if gradient is None:
                continue
            if not self.state[weight]:
                self.state[weight] = self.blank(weight, updates=0)
            state = self.state[weight]
            state["step"] += 1
            whole = flat(gradient)
            for number in range(-(-whole.numel() // CHUNK)):
                yield self._part(group, weight, number, whole, state)

    def _part(
        self, group: dict[str, Any], weight: Tensor, number: int, gradient: Tensor, state: Mapping[str, Any]
    ) -> _Part:
        split = split_of(weight)
        here = [_part_of(state[name], number) for name in MOMENTS]
        changing = [tensor for moment in here for tensor in _tensors(moment)]
        if split is not None:
            changing.append(split.low[chunk(number)])
        given = gradient[chunk(number)]
        home: list[tuple[Tensor, Tensor]] = []
        if self._copies is not None:
            given, *brought = self._copies.bring([given, *changing])
            home = list(zip(changing, brought, strict=True))
            arrived = iter(brought)
            here = [_like(moment, arrived) for moment in here]
        low = home[-1][1] if split is not None and home else None
        return _Part(group, weight, number, given, low, here[0], here[1], state["step"], home)

    def _update_part(self, part: _Part) -> None:
        if self._copies is not None:
            self._copies.arrived()
        gradient = part.gradient.float()
        if self.share is not None:
            gradient = gradient * self.share.to(gradient.dtype)
        weight, number = part.weight, part.number
        split, held = split_of(weight), flat(weight)[chunk(part.number)]
        values = held if split is None else split.read(number, part.low)
        values = values.float()  # the parameter's own memory where it is f32
        if self._has_codes:
            self._compute(part.group, values, gradient, part.first, part.second, part.step)
        else:
            _fused(part, values, gradient)
        if split is not None:
            split.write(number, values, part.low)
        elif held.dtype is torch.bfloat16:
            held.copy_(self._rounded(values, weight, part))
        if self._copies is not None:
            self._copies.send(part.home)

    def _rounded(self, values: Tensor, weight: Tensor, part: _Part) -> Tensor:
        if self._storage is WeightStorage.BF16_NEAREST:
            return values.bfloat16()
        place = self.places[id(weight)]
        key = key_of(self.seed, part.step, place.name)
        return round_stochastically(values, key=key, start=place.start + part.number * CHUNK)


def _fused(part: _Part, values: Tensor, gradient: Tensor) -> None:
    """PyTorch's fused update, as `torch.optim.AdamW` calls it."""
    group, (beta1, beta2) = part.group, part.group["betas"]
    step = torch.tensor(float(part.step), device=values.device)
    torch._fused_adamw_(
        [values],
        [gradient],
        [_tensor(part.first)],
        [_tensor(part.second)],
        [],
        [step],
        amsgrad=False,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _part_of(moment: Tensor | Quantized, number: int) -> Tensor | Quantized:
    if isinstance(moment, Tensor):
        return moment[chunk(number)]
    scales = slice(number * CHUNK // BLOCK, (number + 1) * CHUNK // BLOCK)
    return Quantized(moment.codes[chunk(number)], moment.scales[scales], moment.values)


def _tensor(moment: Tensor | Quantized) -> Tensor:
    assert isinstance(moment, Tensor)
    return moment


def _tensors(moment: Tensor | Quantized) -> list[Tensor]:
    return [moment] if isinstance(moment, Tensor) else [moment.codes, moment.scales]


def _like(moment: Tensor | Quantized, brought: Iterator[Tensor]) -> Tensor | Quantized:
    if isinstance(moment, Tensor):
        return next(brought)
    return Quantized(next(brought), next(brought), moment.values)
