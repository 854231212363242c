"""Whether every value of a tensor is a number: the scan behind ``validate`` and the quality score."""

from __future__ import annotations

import numpy as np

from apr_dist.apr.layout import DType
from apr_dist.apr.reader import AprReader

_CHUNK = 1 << 16  # values at a time: the temporary stays in the processor's cache
_EXPONENTS = {
    DType.F32: (np.uint32, 0x7F80_0000),
    DType.F16: (np.uint16, 0x7C00),
    DType.BF16: (np.uint16, 0x7F80),
    DType.F64: (np.uint64, 0x7FF0_0000_0000_0000),
}
_WHOLE = frozenset({DType.I32, DType.I64, DType.I8, DType.U8})


def count_non_finite(reader: AprReader, name: str) -> int:
    """How many values of the tensor are NaN or infinite.

    A float is neither exactly when not all bits of its exponent are set, so the raw bits are compared.
    """
    dtype = reader.tensors[name].dtype
    if dtype in _WHOLE:
        return 0
    if dtype not in _EXPONENTS:
        return int(np.count_nonzero(~np.isfinite(reader.float32(name))))
    kind, exponent = _EXPONENTS[dtype]
    bits = np.frombuffer(reader.raw(name), kind)
    mask = kind(exponent)
    return sum(
        int(np.count_nonzero((bits[first : first + _CHUNK] & mask) == mask))
        for first in range(0, bits.size, _CHUNK)
    )
