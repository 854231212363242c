"""Gate: every parameter is in the file with the right shape, none is left over, none is nonsense.

Loading is a strict comparison of sets: nothing is reshaped, transposed, truncated or left random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from apr_dist.apr.layout import DType
from apr_dist.apr.reader import AprReader
from apr_dist.cores import usable_cores
from apr_dist.errors import WeightsRefused

MISSING = "FALSIFY-APR-DIST-TRAINER-004"
SHAPE = "FALSIFY-APR-DIST-TRAINER-005"
LEFT_OVER = "FALSIFY-APR-DIST-TRAINER-006"
VALUES = "FALSIFY-APR-DIST-TRAINER-007"
INTEGER = "FALSIFY-APR-DIST-TRAINER-013"

THREADS = 4
"""Most tensors that are looked at at once; each may need a copy in f32."""

_INTEGERS = (DType.I8, DType.U8, DType.I32, DType.I64)

_REMEDY = "import the model again from its source; nothing is filled in, reshaped or dropped here"


def check_names_and_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], *, where: Path
) -> None:
    """The file's tensors are the model's parameters, one for one.

    Raises:
        WeightsRefused: naming the first five that are missing, of another shape, or left over.
    """
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
            remedy="remove them at the source (optimizer tensors, adapters, buffers), and import again",
            falsifier=LEFT_OVER,
        )


def check_values(reader: AprReader, names: Sequence[str]) -> int:
    """Every value is finite, and no matrix or norm is all zero (an all-zero bias is a real one).

    Returns:
        How many values were checked.

    Raises:
        WeightsRefused: naming the first tensor that is not what training could have left.
    """
    with ThreadPoolExecutor(min(THREADS, usable_cores()), "values") as pool:
        return sum(pool.map(lambda name: _check_values_of(reader, name), names))


def _check_values_of(reader: AprReader, name: str) -> int:
    kind = reader.tensors[name].dtype
    if kind in _INTEGERS:
        raise WeightsRefused(
            f"{name} holds integers ({kind.name})",
            where=reader.path,
            expected="floating-point weights, or a quantised type that carries its scales",
            remedy=_REMEDY,
            falsifier=INTEGER,
        )
    values = reader.float32(name)
    # One pass and no temporary: the sum is not finite when any value is not. It may also
    # overflow over large finite values, so only then look at each.
    total = float(np.sum(values, dtype=np.float64))
    if not np.isfinite(total):
        count = int(np.count_nonzero(~np.isfinite(values)))
        raise WeightsRefused(
            f"{name} holds {count} values that are NaN or infinite",
            where=reader.path,
            expected="finite weights",
            remedy="start from an earlier checkpoint",
            falsifier=VALUES,
        )
    if total == 0.0 and not name.endswith(".bias") and not values.any():
        raise WeightsRefused(
            f"every value of {name} is zero",
            where=reader.path,
            expected="trained weights",
            remedy=_REMEDY,
            falsifier=VALUES,
        )
    return values.size


def _some(items: Sequence[str]) -> str:
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return ", ".join(items[:5]) + more
