"""An f32 as its bf16 rounding and the 16 bits it lost; and how a parameter is stored that way.

The pattern of an f32, as an integer, minus that of its bf16 rounding is between -0x8000 and 0x8000. In 16
bits the two ends are the same number, and both occur: they are the ties, half way between two neighbours,
which go to the even one from below and from above. So 16 bits beside a rounding to nearest even are one value
short of exact, and which ties were rounded up is stored too: one weight in 131,072 by chance, one in 16 of
weights that come from f16, until their first update. Everything else is integer arithmetic and holds for
negative numbers, denormals, and finite numbers that round to infinity; a NaN comes back as a NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from apr_dist.parallel.sharded import held_here

CHUNK = 4 << 20
"""Elements that are split, joined and updated at once."""

_HALF = 0x8000


def split(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f32 ``[n]`` to its rounding to nearest even, bf16 ``[n]``, the rest, int16 ``[n]``, and ties.

    Returns:
        (rounding, rest, places of the ties that were rounded up, int32).
    """
    high = values.bfloat16()
    rest = values.view(torch.int32) - (high.view(torch.int16).int() << 16)
    rest.masked_fill_(values.isnan(), 0)
    raised = (rest == -_HALF).nonzero().flatten().int()
    return high, torch.where(rest == _HALF, -_HALF, rest).to(torch.int16), raised


def join(high: Tensor, low: Tensor, raised: Tensor) -> Tensor:
    """The f32 ``[n]`` that `split` took apart."""
    rest = low.int()
    rest.masked_fill_(low == -_HALF, _HALF)
    rest[raised.long()] = -_HALF
    return (rest + (high.view(torch.int16).int() << 16)).view(torch.float32)


@dataclass
class SplitWeight:
    """The elements of a parameter that this rank owns, exact.

    Attributes:
        parameter: the bf16 parameter, whose values are the roundings.
        low: the rest, int16, flat; in host memory where that is offloaded.
        raised: for each `CHUNK` of them the ties that were rounded up, with the parameter.
    """

    parameter: Tensor
    low: Tensor
    raised: list[Tensor]

    @classmethod
    def around(cls, parameter: Tensor, low: Tensor) -> Self:
        """Over a parameter's memory; what ``low`` holds is arbitrary."""
        none = torch.empty(0, dtype=torch.int32, device=held_here(parameter).device)
        return cls(parameter, low, [none] * -(-low.numel() // CHUNK))

    @property
    def high(self) -> Tensor:
        """The roundings, flat: a view, taken again as FSDP2 moves a parameter's memory once."""
        return held_here(self.parameter).detach().view(-1)

    def read(self, number: int, low: Tensor | None = None) -> Tensor:
        """One chunk's f32 values, where the parameter is; with the rest of them if it was brought there."""
        part, high = chunk(number), self.high
        rest = self.low[part].to(high.device) if low is None else low
        return join(high[part], rest, self.raised[number])

    def write(self, number: int, values: Tensor, low: Tensor | None = None) -> None:
        """Replace one chunk's values; the rest goes to ``low`` if that is given."""
        part = chunk(number)
        high, rest, self.raised[number] = split(values)
        self.high[part].copy_(high)
        (self.low[part] if low is None else low).copy_(rest)

    def at(self, places: Tensor) -> Tensor:
        """The f32 values of some elements."""
        starts = (number * CHUNK + one.long() for number, one in enumerate(self.raised))
        high, low = self.high[places], self.low[places.to(self.low.device)].to(places.device)
        rest = low.int().masked_fill_(low == -_HALF, _HALF)
        rest.masked_fill_(torch.isin(places, torch.cat(list(starts))), -_HALF)
        return (rest + (high.view(torch.int16).int() << 16)).view(torch.float32)

    def fill(self, values: Tensor) -> None:
        """Replace all values, from f32 ``[n]`` on any device."""
        for number in range(len(self.raised)):
            self.write(number, values[chunk(number)].to(self.high.device))

    def on_host(self) -> SplitWeight:
        """A copy in host memory that later updates do not change."""
        high, low = (torch.empty_like(one, device="cpu").copy_(one) for one in (self.high, self.low))
        return SplitWeight(high, low, [one.cpu() for one in self.raised])


def chunk(number: int) -> slice:
    """The elements of a chunk."""
    return slice(number * CHUNK, (number + 1) * CHUNK)


_ATTRIBUTE = "_apr_dist_split"


def attach(parameter: Tensor, held: SplitWeight) -> None:
    """Let a parameter be the rounding of a split weight."""
    setattr(parameter, _ATTRIBUTE, held)


def split_of(parameter: Tensor) -> SplitWeight | None:
    """The split weight that a parameter is the rounding of, if it is one."""
    found: SplitWeight | None = getattr(parameter, _ATTRIBUTE, None)
    return found
