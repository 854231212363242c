"""What imports and exports share: the elements of a tensor in another type, and counts of what is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from apr_dist.apr.layout import ELEMENT_BYTES, WRITABLE, DType, TensorEntry, payload_bytes
from apr_dist.apr.reader import AprReader, widen_bfloat16
from apr_dist.apr.writer import TensorSpec
from apr_dist.errors import UnsupportedModelFile

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all) as tensors are written."""

CHUNK_ELEMENTS: Final = 1 << 17
"""Values converted at a time: small enough that the temporaries stay in the processor's cache."""

COPY_BYTES: Final = 4 * 1024 * 1024
"""Bytes copied at a time where nothing is converted."""

_F16_INFINITY = 0x7C00


def kept_type(entry: TensorEntry, wanted: DType | None) -> DType:
    """The type a tensor is written in: as asked, else its own where that can be written, else F16."""
    if wanted is not None:
        return wanted
    return entry.dtype if entry.dtype in WRITABLE else DType.F16


def counted(progress: Progress | None, total: int) -> Callable[[int], None]:
    """A function that is told how many bytes were written just now, and reports all so far."""
    done = 0

    def report(more: int) -> None:
        nonlocal done
        done += more
        if progress:
            progress(done, total)

    return report


def one_by_one(tensors: Mapping[str, TensorEntry], progress: Progress | None) -> Iterator[str]:
    """The names in order; each is reported as done when the next one is asked for."""
    report = counted(progress, sum(entry.size_bytes for entry in tensors.values()))
    for name, entry in tensors.items():
        yield name
        report(entry.size_bytes)


def total_bytes(specs: Iterable[TensorSpec]) -> int:
    """Payload bytes of all tensors together."""
    return sum(payload_bytes(spec.dtype, spec.shape) for spec in specs)


def count_dtypes(specs: Iterable[TensorSpec]) -> dict[str, int]:
    """Tensors by dtype name, most frequent first."""
    return dict(Counter(spec.dtype.name for spec in specs).most_common())


Piece = npt.NDArray[Any] | memoryview
"""Some of a tensor's elements, as they are stored."""


def encode(values: npt.NDArray[np.float32], dtype: DType, *, name: str, where: Path) -> npt.NDArray[Any]:
    """float32 values as F32, F16 or BF16 elements (BF16 as uint16), rounded to nearest even.

    Raises:
        UnsupportedModelFile: a finite value is beyond what F16 can hold.
    """
    if dtype is DType.F32:
        return values
    if dtype is DType.BF16:
        return narrow_bfloat16(values)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    largest = (half.view(np.uint16) & 0x7FFF).max(initial=0)
    if largest >= _F16_INFINITY and not np.isfinite(values).all():
        largest = 0  # what was not finite before is not our doing; the finite scan names it
    if largest >= _F16_INFINITY:
        raise UnsupportedModelFile(
            f"tensor {name!r} holds {float(np.abs(values).max()):.6g}",
            where=where,
            expected="values up to 65504, the largest F16",
            remedy="import with --dtype bf16 or --dtype f32",
        )
    return half


def converted_pieces(
    reader: AprReader, name: str, dtype: DType, *, first: int = 0, count: int | None = None
) -> Iterator[Piece]:
    """A tensor's elements in another dtype, in order, a piece at a time; the same dtype is not touched.

    With ``count`` as many of them, from the one numbered ``first``.
    """
    entry = reader.tensors[name]
    last = entry.num_elements if count is None else first + count
    if entry.dtype is dtype:
        raw = reader.raw(name)
        raw = raw[first * ELEMENT_BYTES[dtype] : last * ELEMENT_BYTES[dtype]] if count is not None else raw
        yield from (raw[start : start + COPY_BYTES] for start in range(0, len(raw), COPY_BYTES))
        return
    plain = entry.dtype in ELEMENT_BYTES
    values: npt.NDArray[Any] = (reader.array(name) if plain else reader.float32(name)).reshape(-1)
    values = values[first:last]
    for start in range(0, values.size, CHUNK_ELEMENTS):
        chunk = values[start : start + CHUNK_ELEMENTS]
        wide = widen_bfloat16(chunk) if entry.dtype is DType.BF16 else chunk.astype(np.float32, copy=False)
        yield encode(wide, dtype, name=name, where=reader.path)


def narrow_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """float32 to BF16 bit patterns, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    quiet = ((bits >> 16) | 0x40).astype(np.uint16)
    return np.where(np.isnan(values), quiet, rounded)


def shortest_float(value: float) -> float:
    """The shortest decimal that means the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
