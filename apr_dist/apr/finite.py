"""What a tensor's values are, seen in their bits: whether all are numbers, and whether all are zero."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from apr_dist.apr.layout import DType
from apr_dist.apr.reader import AprReader

_CHUNK = 1 << 16  # values at a time: the temporary stays in the processor's cache
_BITS = {
    DType.F32: (np.uint32, 0x7F80_0000, 0x7FFF_FFFF),
    DType.F16: (np.uint16, 0x7C00, 0x7FFF),
    DType.BF16: (np.uint16, 0x7F80, 0x7FFF),
}
"""By dtype: an unsigned type of its width, the mask of its exponent, and of everything but the sign."""

_WHOLE = frozenset({DType.I32, DType.I64, DType.I8, DType.U8})


def count_non_finite(reader: AprReader, name: str) -> int:
    """How many values of the tensor are NaN or infinite, as float32.

    A float is neither exactly when not all bits of its exponent are set, so the raw bits are compared.
    """
    dtype = reader.tensors[name].dtype
    if dtype in _WHOLE:
        return 0
    if dtype not in _BITS:
        return int(np.count_nonzero(~np.isfinite(reader.float32(name))))
    _, exponent, _ = _BITS[dtype]
    return sum(int(np.count_nonzero((bits & exponent) == exponent)) for bits in _chunks(reader, name))


def zero_matrix(reader: AprReader, name: str) -> str | None:
    """Name of a matrix or vector all of whose values are zero; None without one.

    It is the tensor, or with three dimensions the first such matrix of it (an expert's), as ``name[index]``.
    Of each no more is read than up to the first value that is not zero.
    """
    entry = reader.tensors[name]
    count = entry.shape[0] if len(entry.shape) == 3 else 1
    if entry.dtype in _BITS:
        kind, _, magnitude = _BITS[entry.dtype]
        values, mask = np.frombuffer(reader.raw(name), kind), magnitude
    else:
        values, mask = (reader.float32(name).reshape(-1) != 0).view(np.uint8), 1
    parts = values.reshape(count, -1) if values.size else values[None]
    for index, part in enumerate(parts):
        if not any((bits & mask).any() for bits in _pieces(part)):
            return name if count == 1 else f"{name}[{index}]"
    return None


def _chunks(reader: AprReader, name: str) -> Iterator[npt.NDArray[Any]]:
    kind, _, _ = _BITS[reader.tensors[name].dtype]
    return _pieces(np.frombuffer(reader.raw(name), kind))


def _pieces(bits: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    for first in range(0, bits.size, _CHUNK):
        yield bits[first : first + _CHUNK]
