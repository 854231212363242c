"""Tensors that other formats hold as one, such as the rows of q, k and v: their parts here, and back.

Which modules a family's files join is in the family's file; an APR file always holds the parts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from apr_dist.apr.layout import DType
from apr_dist.errors import WeightsRefused
from apr_dist.gates.weights import MISSING
from apr_dist.model.config import TransformerConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """Where a tensor of ours is: rows ``first`` to ``first + count`` of a stored one."""

    stored: str
    first: int
    count: int


def stored_tensors(model: TransformerConfig) -> dict[str, tuple[str, ...]]:
    """Every tensor of a file in another format by its Hugging Face name, with those of ours that it holds."""
    owner = {part: whole for whole, parts in model.family.definition.joined.items() for part in parts}
    found: dict[str, tuple[str, ...]] = {}
    for name in model.parameter_shapes():
        module, _, end = name.rpartition(".")
        part = next((one for one in owner if module.endswith(f".{one}")), None)
        stored = name if part is None else f"{module.removesuffix(part)}{owner[part]}.{end}"
        found[stored] = (*found.get(stored, ()), name)
    return found


def where_stored(
    model: TransformerConfig, shapes: Mapping[str, Shape], *, where: Path
) -> dict[str, Rows | None]:
    """Each tensor of a source by its name here, and its rows where it is part of a stored one.

    A tensor that belongs to no part is listed under its own name, for the gates to judge.

    Raises:
        WeightsRefused: the parts of a joined tensor are stored apart, or it has not as many rows as they.
    """
    expected = model.parameter_shapes()
    joined = {name: parts for name, parts in stored_tensors(model).items() if parts != (name,)}
    apart = sorted(shapes.keys() & {part for parts in joined.values() for part in parts})
    if apart:
        whole = next(name for name, parts in joined.items() if apart[0] in parts)
        raise _refused(
            f"{apart[0]} is stored apart, and {model.family} models hold it in {whole}",
            f"the tensors of a {model.family.hf_architecture}",
            where,
        )
    found: dict[str, Rows | None] = {}
    for stored, shape in shapes.items():
        if stored not in joined:
            found[stored] = None
            continue
        counts = [expected[part][0] for part in joined[stored]]
        if not shape or shape[0] != sum(counts):
            raise _refused(
                f"{stored} has the shape {list(shape)}",
                f"{' + '.join(map(str, counts))} rows: those of {', '.join(joined[stored])}",
                where,
            )
        for part, first, count in zip(joined[stored], _begins(counts), counts, strict=True):
            found[part] = Rows(stored, first, count)
    return found


def _begins(counts: list[int]) -> list[int]:
    return [sum(counts[:index]) for index in range(len(counts))]


def joined_shape(parts: Collection[Shape]) -> Shape:
    """The shape of tensors whose rows lie one after another."""
    first = next(iter(parts))
    return (sum(shape[0] for shape in parts), *first[1:])


def joined_type(parts: Collection[DType]) -> DType:
    """The type of tensors that are stored as one: their own, or F32 where they differ."""
    kinds = set(parts)
    return kinds.pop() if len(kinds) == 1 else DType.F32


def _refused(what: str, expected: str, where: Path) -> WeightsRefused:
    return WeightsRefused(
        what,
        where=where,
        expected=expected,
        remedy="get the model again from its own source",
        falsifier=MISSING,
    )
