"""Files on disk: opening a stranger's file without hanging, and putting a new one in place atomically.

Nothing here knows what is in a file; every format of the project is read and written through it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from apr_dist.errors import ModelFileMissing, OutputError

MISSING = "FALSIFY-APR-PRETRAIN-INIT-003"
"""Falsifier of every refusal of a file that is not there or cannot be opened."""


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


class AtomicFile:
    """A new file that appears under its name complete, or not at all.

    Bytes go to a temporary file in the same folder, which is flushed to disk and renamed over the
    target when the ``with`` block ends well, and removed when it does not. An existing target stays
    untouched until the rename.

    Raises:
        OutputError: the target exists and ``overwrite`` is off, the folder is missing or read-only,
            or the disk is full.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self._overwrite = overwrite
        self.temporary = self.path.with_name(f".{self.path.name[:100]}.{secrets.token_hex(6)}.tmp")
        self._refuse_existing()
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._descriptor = os.open(self.temporary, flags, 0o666)
        except OSError as error:
            raise_output_error(self.path, error)

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()

    def write_at(self, offset: int, data: memoryview | bytes) -> None:
        """Write all of ``data`` at ``offset`` bytes from the start."""
        rest = memoryview(data).cast("B")
        try:
            while rest:
                written = os.pwrite(self._descriptor, rest, offset)
                rest, offset = rest[written:], offset + written
        except OSError as error:
            raise_output_error(self.path, error)

    def commit(self) -> None:
        """Flush, rename over the target, flush the folder; on failure nothing is left behind."""
        try:
            self._refuse_existing()
            os.fsync(self._descriptor)
            os.replace(self.temporary, self.path)  # noqa: PTH105 - same call, one place
            sync_folder(self.path.parent)
        except OSError as error:
            self.discard()
            raise_output_error(self.path, error)
        except OutputError:
            self.discard()
            raise
        self._close()

    def discard(self) -> None:
        """Remove the temporary file; calling it twice, or after a commit, does nothing."""
        if self._descriptor >= 0:
            self._close()
            with contextlib.suppress(OSError):
                self.temporary.unlink()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _refuse_existing(self) -> None:
        if self.path.is_dir() or (not self._overwrite and os.path.lexists(self.path)):
            raise OutputError(
                "the output exists already",
                where=self.path,
                expected="a path where nothing is",
                remedy="choose another path, or pass --force to replace a file",
            )


@contextlib.contextmanager
def atomic_path(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary path for a writer of another package; what it wrote takes ``path``'s place at the end.

    Raises:
        OutputError: as ``AtomicFile``; also for any ``OSError`` inside the block.
    """
    file = AtomicFile(path, overwrite=overwrite)
    try:
        with output_errors(path):
            yield file.temporary
    except BaseException:
        file.discard()
        raise
    file.commit()


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn any ``OSError`` inside the block into an ``OutputError`` about ``path``."""
    try:
        yield
    except OSError as error:
        raise_output_error(path, error)


def raise_output_error(path: Path, error: OSError) -> NoReturn:
    """Raise the ``OutputError`` that says what the operating system said, and what to do."""
    remedies: dict[Any, str] = {
        errno.ENOSPC: "free some space or choose a folder on another disk",
        errno.EDQUOT: "free some of your quota or choose a folder on another disk",
        errno.EFBIG: "raise the file size limit or choose another file system",
        errno.ENOENT: f"create the folder {path.parent}",
        errno.ENOTDIR: f"choose a path below a folder; {path.parent} is none",
        errno.EROFS: "choose a folder on a file system that is not mounted read-only",
        errno.ENAMETOOLONG: "choose a shorter name",
    }
    raise OutputError(
        f"the file cannot be written ({error.strerror or error})",
        where=path,
        expected="a writable folder with enough free space",
        remedy=remedies.get(error.errno, f"check the permissions of {path.parent}"),
    ) from error


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
