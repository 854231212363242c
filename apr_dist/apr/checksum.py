"""CRC32 (IEEE, as zlib) of large buffers, on several cores.

zlib-ng folds with the processor's carry-less multiplication where it has one, about five times as fast as
zlib's tables; the values are the same everywhere.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from zlib_ng.zlib_ng import crc32 as crc32_of
from zlib_ng.zlib_ng import crc32_combine as combine

__all__ = ["RESIDUE", "combine", "crc32", "crc32_of"]

RESIDUE: Final = 0x2144DF1C
"""CRC32 of any message followed by its own little-endian CRC32: the check of a whole APR file."""

_PIECE_BYTES = 16 * 1024 * 1024


def crc32(data: memoryview, *, threads: int | None = None) -> int:
    """CRC32 of ``data`` (any contiguous bytes), on ``threads`` cores (default: those we may use)."""
    cores = threads or _usable_cores()
    if cores == 1 or len(data) <= 2 * _PIECE_BYTES:
        return crc32_of(data)
    pieces = [data[start : start + _PIECE_BYTES] for start in range(0, len(data), _PIECE_BYTES)]
    with ThreadPoolExecutor(cores) as pool:  # the GIL is released for each piece
        sums = list(pool.map(crc32_of, pieces))
    total = 0
    for piece, value in zip(pieces, sums, strict=True):
        total = combine(total, value, len(piece))
    return total


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
