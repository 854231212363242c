"""CRC32 (IEEE, as zlib) of large buffers: on several cores, and of pieces that arrive in any order.

The combination follows zlib's: appending n zero bytes to a message multiplies its CRC, seen as a
polynomial over GF(2), by x^(8n) modulo the CRC polynomial.
"""

from __future__ import annotations

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Final

RESIDUE: Final = 0x2144DF1C
"""CRC32 of any message followed by its own little-endian CRC32: the check of a whole APR file."""

_POLYNOMIAL = 0xEDB88320
_ONE = 0x80000000  # the polynomial 1 in reflected bit order
_PIECE_BYTES = 16 * 1024 * 1024


def crc32(data: memoryview, *, threads: int | None = None) -> int:
    """CRC32 of ``data`` (any contiguous bytes), on ``threads`` cores (default: those we may use)."""
    cores = threads or _usable_cores()
    if cores == 1 or len(data) <= 2 * _PIECE_BYTES:
        return zlib.crc32(data)
    pieces = [data[start : start + _PIECE_BYTES] for start in range(0, len(data), _PIECE_BYTES)]
    with ThreadPoolExecutor(cores) as pool:  # zlib releases the GIL
        sums = list(pool.map(zlib.crc32, pieces))
    shift = _power_of_x(8 * _PIECE_BYTES)
    total = sums[0]
    for piece, value in zip(pieces[1:], sums[1:], strict=True):
        step = shift if len(piece) == _PIECE_BYTES else _power_of_x(8 * len(piece))
        total = _multiply(step, total) ^ value
    return total


def combine(first: int, second: int, second_bytes: int) -> int:
    """CRC32 of the concatenation of two messages, from their CRCs and the second one's length."""
    return _multiply(_power_of_x(8 * second_bytes), first) ^ second


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _multiply(left: int, right: int) -> int:
    """Product of two polynomials modulo the CRC polynomial, bits reflected."""
    product = 0
    while left:
        if left & _ONE:
            product ^= right
        left = (left << 1) & 0xFFFFFFFF
        right = (right >> 1) ^ (_POLYNOMIAL if right & 1 else 0)
    return product


def _power_of_x(exponent: int) -> int:
    """x**exponent modulo the CRC polynomial, by repeated squaring."""
    result, square = _ONE, _ONE >> 1
    while exponent:
        if exponent & 1:
            result = _multiply(square, result)
        square = _multiply(square, square)
        exponent >>= 1
    return result
