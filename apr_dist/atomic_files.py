"""Putting files in place atomically: complete under their name, or not there at all.

Lives here: the temporary file that is flushed and renamed, flushing a folder, the digest of a file, and
the translation of the operating system's refusals into ours. Nothing here knows what is in a file; shards,
checkpoints, models and pages are all written through it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

from apr_dist.errors import OutputError

_REMEDIES: Final[dict[Any, str]] = {
    errno.ENOSPC: "free some space or choose a folder on another disk, and run the same command again",
    errno.EDQUOT: "free some of your quota or choose another disk, and run the same command again",
    errno.EFBIG: "raise the file size limit or choose another file system",
    errno.EROFS: "choose a folder on a file system that is not mounted read-only",
    errno.ENAMETOOLONG: "choose a shorter name",
}


_PIECE = 8 << 20  # bytes hashed at a time


def file_digest(path: Path, counted: Callable[[int], object] = lambda _: None) -> str:
    """``sha256:...`` of a file's bytes, read in pieces; ``counted`` is called with the size of each."""
    hashed = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            hashed.update(piece)
            counted(len(piece))
    return f"sha256:{hashed.hexdigest()}"


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
        self._refuse_existing()
        self.temporary = temporary_beside(self.path)
        with writing_to(self.path):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._descriptor = os.open(self.temporary, flags, 0o666)

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
            _raise_output_error(self.path, error)

    def commit(self) -> None:
        """Flush, rename over the target, flush the folder; on failure nothing is left behind."""
        try:
            self._refuse_existing()
            with writing_to(self.path):
                os.fsync(self._descriptor)
                self.temporary.replace(self.path)
                flush_folder(self.path.parent)
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove the temporary file; calling it twice, or after a commit, does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            with contextlib.suppress(OSError):
                self.temporary.unlink(missing_ok=True)

    def _refuse_existing(self) -> None:
        if not self.path.name or self.path.is_dir():
            what, remedy = "the output is a folder", "name a file in it"
        elif not os.path.lexists(self.path) or (self._overwrite and self.path.is_file()):
            return
        elif self.path.exists() and not self.path.is_file():
            what, remedy = "the output is a pipe, socket or device", "choose another path"
        else:
            what = "the output exists already"
            remedy = "choose another path, or pass --force to replace a file"
        raise OutputError(what, where=self.path, expected="a path where nothing is", remedy=remedy)


@contextlib.contextmanager
def atomic_path(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary path for a writer of another package; what it wrote takes ``path``'s place at the end.

    Raises:
        OutputError: as ``AtomicFile``; also for any ``OSError`` inside the block.
    """
    with AtomicFile(path, overwrite=overwrite) as file, writing_to(path):
        yield file.temporary
        _flush(file.temporary, os.O_RDWR)  # the writer may have put a new file under the name


def temporary_beside(path: Path) -> Path:
    """A name that nobody uses in the folder of ``path``, hidden, for what will take its place."""
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(6)}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether `temporary_beside` gave the name: a file of a process at work, or of a killed one."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def write_atomically(path: Path, content: bytes) -> None:
    """Make ``path`` hold ``content``, whatever was there before.

    Raises:
        OutputError: the folder is read-only or missing, or the disk is full; the old file is untouched.
    """
    with AtomicFile(path, overwrite=True) as file:
        file.write_at(0, content)


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn any ``OSError`` inside the block into an ``OutputError`` about ``path``."""
    try:
        yield
    except OSError as error:
        _raise_output_error(path, error)


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    _flush(folder, os.O_RDONLY | os.O_DIRECTORY)


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_output_error(path: Path, error: OSError) -> NoReturn:
    """Say what the operating system said, and what to do about it."""
    remedies = _REMEDIES | {
        errno.ENOENT: f"create the folder {path.parent}",
        errno.ENOTDIR: f"choose a path below a folder; {path.parent} is none",
    }
    raise OutputError(
        f"it cannot be written ({error.strerror or error})",
        where=path,
        expected="a writable folder with enough free space",
        remedy=remedies.get(error.errno, f"check the permissions of {path.parent}"),
    ) from error
