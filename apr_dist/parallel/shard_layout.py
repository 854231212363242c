"""Which elements of each whole tensor a rank holds, as one run of it flattened row by row.

FSDP2 cuts rows, ZeRO-3 cuts elements, replicas hold all: here all of them are a start and a flat view, so
that loading, proving and saving move runs of elements and never need to hold a tensor whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from apr_dist.choices import Strategy
from apr_dist.parallel.heartbeat import HERE
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.sharded import as_dtensor, held_here
from apr_dist.parallel.split_weights import CHUNK, SplitWeight, chunk, split_of

RUN_ELEMENTS = CHUNK
"""Elements that travel at once: 16 MiB in f32."""


@dataclass(frozen=True)
class Piece:
    """A run of elements of a whole tensor.

    Attributes:
        name: of the tensor.
        shape: of the whole tensor.
        start: the first element's place in it, flattened row by row.
        values: the elements, flat.
        split: the split weight whose rounding they are, if they are one.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor
    split: SplitWeight | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that a copy takes."""
        low = 0 if self.split is None else self.split.low.nbytes
        return self.values.nbytes + low

    def run(self, at: int, count: int) -> Tensor:
        """Elements from ``at`` on, exact; ``at`` is a multiple of `RUN_ELEMENTS`."""
        return _run(self.values, self.split, at, count)

    def on_host(self) -> Piece:
        """A copy in host memory that later steps do not change."""
        if self.split is not None:
            split = self.split.on_host()
            return replace(self, values=split.high, split=split)
        copied = torch.empty(self.values.shape, dtype=self.values.dtype, device="cpu")
        return replace(self, values=copied.copy_(self.values))

    def part(self, number: int, of: int) -> Piece:
        """One of ``of`` nearly equal parts, which may be empty."""
        each = -(-self.values.numel() // of)
        begin = min(number * each, self.values.numel())
        return replace(self, start=self.start + begin, values=self.values[begin : begin + each])


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the whole parameter, of which this rank may hold a part."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def span(shape: tuple[int, ...], runtime: Runtime, rank: int) -> tuple[int, int]:
    """First element and one past the last that ``rank`` holds of a weight of this shape."""
    total, size = math.prod(shape), runtime.shard_size
    # FSDP2 cuts rows, as torch.chunk does; all others cut elements.
    unit = math.prod(shape[1:]) if runtime.strategy.is_fsdp else 1
    each = -(-total // unit // size) * unit
    part = rank % size
    return min(part * each, total), min((part + 1) * each, total)


def local(parameter: Tensor, runtime: Runtime) -> Tensor:
    """This rank's elements of a weight, or of a moment that lies like one: a flat view, without padding."""
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return held_here(parameter).detach().view(-1)
    begin, end = span(whole_shape(parameter), runtime, runtime.rank)
    return part.detach()[: end - begin]  # type: ignore[no-any-return]


def shard_group(parameter: Tensor) -> dist.ProcessGroup | None:
    """The ranks that together hold one copy of a sharded weight; None: all of them."""
    if (sharded := as_dtensor(parameter)) is None:
        return None
    cut = [placement.is_shard(0) for placement in sharded.placements]
    return sharded.device_mesh.get_group(cut.index(True))


def whole_in_runs(parameter: Tensor, runtime: Runtime) -> Iterator[Tensor]:
    """All elements of a weight in order, flat and a run at a time, on every rank; read only.

    A collective where parameters are sharded: every rank takes every run of the same parameters.
    """
    mine, split = local(parameter, runtime), split_of(parameter)
    if not runtime.strategy.shards_parameters:
        yield from [mine] if split is None else map(split.read, range(len(split.lowered)))
        return
    group, shape = shard_group(parameter), whole_shape(parameter)
    first = runtime.rank - runtime.rank % runtime.shard_size
    for owner in range(first, first + runtime.shard_size):
        begin, end = span(shape, runtime, owner)
        for count, at in runs(begin, end):
            if owner == runtime.rank:
                run = _run(mine, split, at - begin, count).to(runtime.device)
            else:
                kind = mine.dtype if split is None else torch.float32
                run = torch.empty(count, dtype=kind, device=runtime.device)
            dist.broadcast(run, src=owner, group=group)
            HERE.moved()
            yield run


def _run(values: Tensor, split: SplitWeight | None, at: int, count: int) -> Tensor:
    return values[at : at + count] if split is None else split.read(at // RUN_ELEMENTS)[:count]


def runs(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """(count, start) of the runs in which the elements from ``begin`` to ``end`` travel."""
    for at in range(begin, end, RUN_ELEMENTS):
        yield min(RUN_ELEMENTS, end - at), at


def fill(parameter: Tensor, values: Tensor | None, runtime: Runtime) -> None:
    """Give one weight, wherever its parts lie, the values rank 0 holds; a collective.

    No rank but 0 ever holds more of it than its own part.

    Args:
        parameter: replicated, an FSDP2 shard, or a ZeRO-3 partition.
        values: the whole f32 values on rank 0, in host memory; None elsewhere.
        runtime: this rank's view of the run.
    """
    if not runtime.strategy.shards_parameters:
        _fill_replicas(parameter, values, runtime)
        return
    if runtime.rank < runtime.shard_size:
        _scatter(parameter, values, runtime)
    if runtime.strategy is Strategy.HSDP and (sharded := as_dtensor(parameter)) is not None:
        copies = sharded.device_mesh.get_group("replicate")
        mine, split = local(parameter, runtime), split_of(parameter)
        exact = (
            [split.read(number) for number in range(len(split.lowered))] if split and len(mine) else [mine]
        )
        values = torch.cat(exact).to(runtime.device)
        dist.broadcast(values, src=runtime.rank % runtime.shard_size, group=copies)
        _store(parameter, values, runtime)


def _fill_replicas(parameter: Tensor, values: Tensor | None, runtime: Runtime) -> None:
    """Every rank's whole copy."""
    split = split_of(parameter)
    if split is None:
        if values is not None:
            parameter.data.copy_(values)
        runtime.broadcast(parameter.data)
        return
    for number in range(len(split.lowered)):
        count = split.high[chunk(number)].numel()
        part = torch.empty(count, device=runtime.device)
        if values is not None:
            part.copy_(values.reshape(-1)[chunk(number)])
        split.write(number, runtime.broadcast(part))


def _store(parameter: Tensor, values: Tensor, runtime: Runtime) -> None:
    """This rank's elements, from f32 ``[n]``."""
    split = split_of(parameter)
    if split is None:
        local(parameter, runtime).copy_(values)
    else:
        split.fill(values)


def _scatter(parameter: Tensor, values: Tensor | None, runtime: Runtime) -> None:
    """Rank 0's values into the parts of the first copy; its ranks call this."""
    shape = whole_shape(parameter)
    begin, end = span(shape, runtime, 0)
    each, mine = end - begin, local(parameter, runtime)  # the first part is never a shorter one
    parts = None
    if values is not None:
        flat = values.reshape(-1).to(runtime.device)  # on CPU the mapped file itself
        parts = [_padded(flat, span(shape, runtime, rank), each) for rank in range(runtime.shard_size)]
    fits = (mine.numel(), mine.device, mine.dtype) == (each, runtime.device, torch.float32)
    part = mine if fits else torch.empty(each, dtype=torch.float32, device=runtime.device)
    dist.scatter(part, parts, src=0, group=shard_group(parameter))
    if not fits:
        _store(parameter, part[: mine.numel()], runtime)


def _padded(flat: Tensor, where: tuple[int, int], size: int) -> Tensor:
    part = flat[where[0] : where[1]]
    return part if part.numel() == size else torch.nn.functional.pad(part, (0, size - part.numel()))
