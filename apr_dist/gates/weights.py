"""Gate: every parameter is in the file with the right shape, none is left over, none is nonsense.

Loading is a strict comparison of sets: nothing is reshaped, transposed, truncated or left random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from apr_dist.apr.finite import count_non_finite, zero_matrix
from apr_dist.apr.layout import DType
from apr_dist.apr.reader import AprReader
from apr_dist.cores import usable_cores
from apr_dist.errors import WeightsRefused
from apr_dist.gates.names import ROTARY_BUFFER, plain_names
from apr_dist.model.config import how_to_state

MISSING = "FALSIFY-APR-DIST-TRAINER-004"
SHAPE = "FALSIFY-APR-DIST-TRAINER-005"
LEFT_OVER = "FALSIFY-APR-DIST-TRAINER-006"
VALUES = "FALSIFY-APR-DIST-TRAINER-007"
INTEGER = "FALSIFY-APR-DIST-TRAINER-013"

THREADS = 4
"""Most tensors that are looked at at once; each may need a copy in f32."""

_INTEGERS = (DType.I8, DType.U8, DType.I32, DType.I64)

_REMEDY = "import the model again from its source, a complete copy; nothing is filled in or reshaped here"


def check_names_and_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], *, where: Path
) -> None:
    """The file's tensors are the model's parameters, one for one.

    Raises:
        WeightsRefused: naming the first five that are missing, of another shape, or left over.
    """
    wrapped = [name for name, plain in plain_names(found).items() if name != plain]
    if wrapped:
        raise WeightsRefused(
            f"{len(wrapped)} tensor names carry a prefix of the program that wrote them: {_some(wrapped)}",
            where=where,
            expected="plain names, such as model.layers.0.mlp.up_proj.weight",
            remedy=f"apr-dist import {where} -o plain.apr removes it",
            falsifier=MISSING,
        )
    missing = [name for name in expected if name not in found]
    if missing:
        raise WeightsRefused(
            f"{len(missing)} of {len(expected)} parameters are missing: {_some(missing)}",
            where=where,
            expected="every parameter of the model; a missing one would stay random",
            remedy=_REMEDY,
            falsifier=MISSING,
        )
    odd = [
        f"{name} is {list(found[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if found[name] != shape
    ]
    if odd:
        raise WeightsRefused(
            f"{len(odd)} tensors have another shape: {_some(odd)}",
            where=where,
            expected="the shapes that the file's own dimensions give",
            remedy=_REMEDY,
            falsifier=SHAPE,
        )
    extra = [name for name in found if name not in expected]
    if extra:
        raise WeightsRefused(
            f"{len(extra)} tensors belong to no parameter: {_some(extra)}",
            where=where,
            expected=f"exactly the model's {len(expected)} parameters",
            remedy=_leave_out(extra, where),
            falsifier=LEFT_OVER,
        )


def check_values(
    reader: AprReader,
    names: Sequence[str],
    *,
    where: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Every value is finite, and no matrix or norm is all zero (an all-zero bias is a real one).

    Args:
        reader: the file.
        names: the tensors to look at.
        where: what a refusal names in place of the file.
        progress: called with (bytes looked at, bytes in all).

    Returns:
        How many values were checked.

    Raises:
        WeightsRefused: naming the first tensor that is not what training could have left.
    """
    entries = [reader.tensors[name] for name in names]
    done, total = 0, sum(entry.size_bytes for entry in entries)
    with ThreadPoolExecutor(min(THREADS, usable_cores()), "values") as pool:
        checks = pool.map(lambda name: _check_values_of(reader, name, where or reader.path), names)
        for entry, _ in zip(entries, checks, strict=True):
            done += entry.size_bytes
            if progress:
                progress(done, total)
    return sum(entry.num_elements for entry in entries)


def _check_values_of(reader: AprReader, name: str, where: Path) -> None:
    kind = reader.tensors[name].dtype
    if kind in _INTEGERS:
        raise WeightsRefused(
            f"{name} holds integers ({kind.name})",
            where=where,
            expected="floating-point weights, or a quantised type that carries its scales",
            remedy=_REMEDY,
            falsifier=INTEGER,
        )
    count = count_non_finite(reader, name)
    if count:
        raise WeightsRefused(
            f"{name} holds {count} values that are NaN or infinite",
            where=where,
            expected="finite weights",
            remedy="start from an earlier checkpoint, or import the model again from its source",
            falsifier=VALUES,
        )
    if not name.endswith(".bias") and (zero := zero_matrix(reader, name)) is not None:
        raise WeightsRefused(
            f"every value of {zero} is zero",
            where=where,
            expected="trained weights",
            remedy=_REMEDY,
            falsifier=VALUES,
        )
    reader.forget(name)


def _leave_out(extra: Sequence[str], where: Path) -> str:
    if all(name.endswith(ROTARY_BUFFER) for name in extra):
        return f"apr-dist import {where} -o plain.apr leaves these buffers out"
    if {name.split("self_attn.")[-1] for name in extra} == {f"{part}_proj.bias" for part in "qkvo"}:
        return how_to_state(where, attention_bias=True)
    if all(name.endswith(".bias") for name in extra):
        return "start from a model without these biases; without them it would compute something else"
    return "remove them at the source (optimizer tensors, adapters, buffers), and import again"


def _some(items: Sequence[str]) -> str:
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return ", ".join(items[:5]) + more
