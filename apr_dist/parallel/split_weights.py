"""An f32 as its bf16 rounding and the 16 bits it lost; and how a parameter is stored that way.

The pattern of an f32, as an integer, minus that of its bf16 rounding is between -0x8000 and 0x8000. In 16
bits the two ends are the same number, and both occur: they are the ties, half way between two neighbours,
which go to the even one from below and from above. So 16 bits beside a rounding to nearest even are one value
short of exact, and which ties were rounded down is stored too: one weight in 131,072 by chance, one in 16 of
weights that come from f16, until their first update. Everything else is integer arithmetic and holds for
negative numbers, denormals, and finite numbers that round to infinity; a NaN comes back as a NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from apr_dist.parallel.sharded import held_here

CHUNK = 1 << 20
"""Elements that are split, joined and updated at once: few enough for a core's cache, enough for a link."""

_HALF = 0x8000


def split(values: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """Write f32 ``[n]`` as its rounding to nearest even, bf16 ``[n]``, and the rest, int16 ``[n]``.

    The rest ends in the same 16 bits as the value, because those of its rounding are zero.

    Returns:
        places of the ties that were rounded down, int32.
    """
    patterns = values.view(torch.int32)
    high.copy_(values)
    low.copy_(patterns)  # the lower half of each
    ties = _places(low == -_HALF)
    is_even = patterns[ties].bitwise_and_(0x10000) == 0
    return ties[is_even].int()


def _places(found: Tensor) -> Tensor:
    """Where bools ``[n]`` are true, int64; few are, so that eight are looked at together."""
    if len(found) % 8:
        return found.nonzero().flatten()
    eights = found.view(torch.int64).nonzero()
    places = (8 * eights + torch.arange(8, device=found.device)).flatten()
    return places[found[places].nonzero().flatten()]


def join(high: Tensor, low: Tensor, lowered: Tensor) -> Tensor:
    """The f32 ``[n]`` that `split` took apart."""
    whole = low.int().add_(high.view(torch.int16), alpha=0x10000)
    whole[lowered.long()] += 0x10000  # their rest is a half, not minus a half
    return whole.view(torch.float32)


@dataclass
class SplitWeight:
    """The elements of a parameter that this rank owns, exact.

    Attributes:
        parameter: the bf16 parameter, whose values are the roundings.
        low: the rest, int16, flat; in host memory where that is offloaded.
        lowered: for each `CHUNK` of them the ties that were rounded down, with the parameter.
    """

    parameter: Tensor
    low: Tensor
    lowered: list[Tensor]

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
        return join(high[part], rest, self.lowered[number])

    def write(self, number: int, values: Tensor, low: Tensor | None = None) -> None:
        """Replace one chunk's values; the rest goes to ``low`` if that is given."""
        part = chunk(number)
        high = self.high[part]
        rest = self.low[part] if low is None else low
        here = rest if rest.device == high.device else torch.empty_like(high, dtype=torch.int16)
        self.lowered[number] = split(values, high, here)
        if here is not rest:
            rest.copy_(here)

    def at(self, places: Tensor) -> Tensor:
        """The f32 values of some elements."""
        starts = (number * CHUNK + one.long() for number, one in enumerate(self.lowered))
        high, low = self.high[places], self.low[places.to(self.low.device)].to(places.device)
        whole = low.int().add_(high.view(torch.int16), alpha=0x10000)
        whole[torch.isin(places, torch.cat(list(starts)))] += 0x10000
        return whole.view(torch.float32)

    def fill(self, values: Tensor) -> None:
        """Replace all values, from f32 ``[n]`` on any device."""
        for number in range(len(self.lowered)):
            self.write(number, values[chunk(number)].to(self.high.device))

    def on_host(self) -> SplitWeight:
        """A copy in host memory that later updates do not change."""
        high, low = (torch.empty_like(one, device="cpu").copy_(one) for one in (self.high, self.low))
        return SplitWeight(high, low, [one.cpu() for one in self.lowered])


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
