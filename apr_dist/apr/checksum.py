"""CRC32 (IEEE, as zlib) of large buffers, on several cores.

zlib-ng folds with the processor's carry-less multiplication where it has one, about five times as fast as
zlib's tables; the values are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from zlib_ng.zlib_ng import crc32 as crc32_of
from zlib_ng.zlib_ng import crc32_combine as combine

from apr_dist.cores import usable_cores

__all__ = ["RESIDUE", "combine", "crc32", "crc32_of"]

RESIDUE: Final = 0x2144DF1C
"""CRC32 of any message followed by its own little-endian CRC32: the check of a whole APR file."""

_PIECE_BYTES = 4 * 1024 * 1024


def crc32(
    data: memoryview,
    *,
    threads: int | None = None,
    done: Callable[[memoryview], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """CRC32 of ``data`` (any contiguous bytes), on ``threads`` cores (default: those we may use).

    ``done`` is called with each piece that was read, from any thread: a map can let go of its pages.
    ``progress`` is called with (bytes summed, bytes in all), from this thread.
    """
    cores = threads or usable_cores()
    pieces = [data[start : start + _PIECE_BYTES] for start in range(0, len(data), _PIECE_BYTES)]

    def one(piece: memoryview) -> int:
        found: int = crc32_of(piece)
        if done is not None:
            done(piece)
        return found

    total = summed = 0
    with ThreadPoolExecutor(cores) as pool:  # the GIL is released for each piece
        few = cores == 1 or len(pieces) <= 8  # not worth the threads
        for piece, value in zip(pieces, map(one, pieces) if few else pool.map(one, pieces), strict=True):
            total = combine(total, value, len(piece))
            summed += len(piece)
            if progress is not None:
                progress(summed, len(data))
    return total
