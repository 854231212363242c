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


def is_all_zero(reader: AprReader, name: str) -> bool:
    """Whether every value of the tensor is zero; stops at the first that is not."""
    dtype = reader.tensors[name].dtype
    if dtype not in _BITS:
        return not reader.float32(name).any()
    _, _, magnitude = _BITS[dtype]
    return not any((bits & magnitude).any() for bits in _chunks(reader, name))


def _chunks(reader: AprReader, name: str) -> Iterator[npt.NDArray[Any]]:
    kind, _, _ = _BITS[reader.tensors[name].dtype]
    bits = np.frombuffer(reader.raw(name), kind)
    for first in range(0, bits.size, _CHUNK):
        yield bits[first : first + _CHUNK]
