"""Files of strangers: opened without hanging, mapped read-only, their memory given back.

Nothing here knows what is in a file; every model format of the project is read through it. New files
are put in place by ``apr_dist.atomic_files``.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from apr_dist.errors import ModelFileMissing

MISSING = "FALSIFY-APR-PRETRAIN-INIT-003"
"""Falsifier of every refusal of a file that is not there or cannot be opened."""

_PIECE_BYTES = 4 << 20


def open_regular(path: Path) -> int:
    """Open a regular file for reading and return its descriptor; never blocks on a pipe.

    Raises:
        ModelFileMissing: nothing is there, it is no regular file, or it may not be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _cannot_open(path, error) from error
    except ValueError as error:  # a path with a NUL byte
        raise _missing(path, "the path holds a NUL byte") from error
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file (a pipe, socket or device)"
    raise _missing(path, f"it is {kind}")


def map_readonly(path: Path) -> memoryview:
    """The bytes of a regular file, mapped read-only; views of them keep the map alive.

    Raises:
        ModelFileMissing: as ``open_regular``.
    """
    descriptor = open_regular(path)
    try:
        if os.fstat(descriptor).st_size == 0:  # an empty file cannot be mapped
            return memoryview(b"")
        return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    finally:
        os.close(descriptor)


def forget(view: memoryview) -> None:
    """Let the system take back the memory that reading this part of a map filled; it can be read again."""
    source = view.obj
    if not isinstance(source, mmap.mmap) or not hasattr(source, "madvise") or not len(view):
        return
    base = np.frombuffer(source, np.uint8).ctypes.data
    first = (np.frombuffer(view, np.uint8).ctypes.data - base) // mmap.PAGESIZE * mmap.PAGESIZE
    end = np.frombuffer(view, np.uint8).ctypes.data - base + len(view)
    source.madvise(mmap.MADV_DONTNEED, first, end - first)


def passing(view: memoryview) -> Iterator[memoryview]:
    """All of a map in order, in pieces of 4 MiB, letting go of each when the next is asked for."""
    for start in range(0, len(view), _PIECE_BYTES):
        piece = view[start : start + _PIECE_BYTES]
        yield piece
        forget(piece)


def _cannot_open(path: Path, error: OSError) -> ModelFileMissing:
    if error.errno in {errno.ENOENT, errno.ENOTDIR}:
        return _missing(path, "there is no such file")
    return _missing(path, f"it cannot be opened ({error.strerror})")


def _missing(path: Path, what: str) -> ModelFileMissing:
    return ModelFileMissing(
        what,
        where=path,
        expected="a readable model file",
        remedy="check the path and its permissions",
        falsifier=MISSING,
    )
