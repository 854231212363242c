"""A mixture's tensors where each expert has its own, and where all of a block lie in one; both ways.

Models are published with a tensor for each matrix of an expert; ``transformers`` since version 5, and this
project, keep those of a block together: ``experts.gate_up_proj`` ``[experts, 2 * inner, hidden]`` with the
rows of each gate first, and ``experts.down_proj`` ``[experts, hidden, inner]``. The elements are the same in
the same order, so nothing is ever held but a piece of one tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from apr_dist.apr.writer import TensorSpec
from apr_dist.errors import WeightsRefused
from apr_dist.gates.weights import MISSING
from apr_dist.model.config import TransformerConfig
from apr_dist.model.families import Family
from apr_dist.model.families._definition import ExpertNames

Shape = tuple[int, ...]

_LAYER: Final = re.compile(r"(model\.layers\.\d+\.)(.+)")
_FUSED_ENDS: Final = ("gate_up_proj", "down_proj")
_OURS: Final = "mlp.experts."


@dataclass(frozen=True)
class Joined:
    """The stored tensors that one of ours is made of, in the order of its elements.

    Attributes:
        parts: their plain names.
        shape: of all together.
    """

    parts: tuple[str, ...]
    shape: Shape


def joined_tensors(
    names: Iterable[str], shape_of: Callable[[str], Shape], *, where: Path
) -> dict[str, Joined]:
    """What each tensor of the model is made of; those of experts are joined, whatever layout they have.

    Args:
        names: plain names of the stored tensors.
        shape_of: gives the shape of one.
        where: what a refusal names.

    Raises:
        WeightsRefused: an expert lacks a matrix, or experts of a block have different shapes.
    """
    found: dict[str, Joined] = {}
    experts: dict[tuple[str, ExpertNames], dict[tuple[int, str], str]] = {}
    for stored in names:
        layer, _, within = _split(stored)
        layout = next((one for one in _layouts() if within.startswith(one.experts)), None)
        number, _, matrix = within.removeprefix(layout.experts).partition(".") if layout else ("", "", "")
        if layout and number.isdecimal() and matrix in (layout.gate, layout.up, layout.down):
            experts.setdefault((layer, layout), {})[int(number), matrix] = stored
        else:
            found[layer + _renamed(within)] = Joined((stored,), shape_of(stored))
    for (layer, layout), matrices in experts.items():
        found |= _joined_experts(layer, layout, matrices, shape_of, where)
    return found


def _split(plain: str) -> tuple[str, str, str]:
    """Layer, nothing, and the name within it; outside the layers no layer and the whole name."""
    match = _LAYER.fullmatch(plain)
    return (match[1], "", match[2]) if match else ("", "", plain)


def _layouts() -> list[ExpertNames]:
    """Every way in which a family's experts are named, each once."""
    stated = (family.definition.experts for family in Family)
    return list(dict.fromkeys(one for one in stated if one is not None))


def _renamed(within: str) -> str:
    """Our name of a router, or of a block's experts together, that older releases kept elsewhere."""
    for layout in _layouts():
        if within == layout.router:
            return "mlp.gate.weight"
        if within in {layout.experts + end for end in _FUSED_ENDS}:
            return _OURS + within.removeprefix(layout.experts)
    return within


def _joined_experts(
    layer: str,
    layout: ExpertNames,
    matrices: Mapping[tuple[int, str], str],
    shape_of: Callable[[str], Shape],
    where: Path,
) -> dict[str, Joined]:
    count = 1 + max(number for number, _ in matrices)
    kinds = {layout.gate: (layout.gate, layout.up), layout.down: (layout.down,)}
    found = {}
    for (first, together), ours in zip(kinds.items(), _FUSED_ENDS, strict=True):
        wanted = [(number, one) for number in range(count) for one in together]
        missing = [
            f"{layer}{layout.experts}{number}.{one}"
            for number, one in wanted
            if (number, one) not in matrices
        ]
        if missing:
            raise _refused(f"{len(missing)} matrices of experts are missing, first {missing[0]}", where)
        parts = tuple(matrices[key] for key in wanted)
        shapes = {shape_of(part) for part in parts}
        shape = shape_of(parts[0])
        if len(shapes) > 1 or len(shape) != 2:
            raise _refused(f"the experts' {first} of {layer} have shapes {sorted(shapes)}", where)
        found[layer + _OURS + ours] = Joined(parts, (count, len(together) * shape[0], shape[1]))
    return found


def _refused(what: str, where: Path) -> WeightsRefused:
    return WeightsRefused(
        what,
        where=where,
        expected="every expert of a block with all its matrices, in the same shapes",
        remedy="copy or download the model again",
        falsifier=MISSING,
    )


@dataclass(frozen=True)
class Part:
    """A tensor to be written: whole ones of ours one after another, or some elements of one.

    Attributes:
        spec: what is written.
        sources: our tensors.
        first: of a single one the first element that belongs to it.
    """

    spec: TensorSpec
    sources: tuple[str, ...]
    first: int = 0

    def spans(self) -> Iterator[tuple[str, int, int | None]]:
        """Each source, its first element that is written, and how many are; None: all."""
        count = math.prod(self.spec.shape) if len(self.sources) == 1 else None
        for source in self.sources:
            yield source, self.first, count


def parted_tensor(spec: TensorSpec, sources: tuple[str, ...], model: TransformerConfig) -> Iterator[Part]:
    """The published tensors that one becomes, in the order of its elements.

    Args:
        spec: a tensor as this project, or a family's files, hold it.
        sources: our tensors that it is made of.
        model: what they are of.
    """
    layout = model.family.definition.experts
    layer, _, within = _split(spec.name)
    if layout is None or model.num_experts is None:
        yield Part(spec, sources)
    elif within == "mlp.gate.weight":
        yield Part(TensorSpec(layer + layout.router, spec.dtype, spec.shape), sources)
    elif within in {_OURS + end for end in _FUSED_ENDS}:
        together = (layout.down,) if within.endswith("down_proj") else (layout.gate, layout.up)
        _, rows, columns = spec.shape
        shape = (rows // len(together), columns)
        each = math.prod(shape)
        for index in range(model.num_experts * len(together)):
            number, matrix = divmod(index, len(together))
            name = f"{layer}{layout.experts}{number}.{together[matrix]}"
            yield Part(TensorSpec(name, spec.dtype, shape), sources, index * each)
    else:
        yield Part(spec, sources)
