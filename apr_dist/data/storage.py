"""Writing that leaves either the old file or the new one, never half of either.

Lives here: atomic replacement, folder flushing, and the translation of operating-system errors into
ours. What is written (shards, manifests, tokenizers) lives in the rooms that know their content.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from apr_dist.errors import OutputError


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn an operating-system error inside the block into an ``OutputError`` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise _output_error(path, error) from error


def flush_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable (a rename alone does not survive a power cut)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``: temporary file beside it, fsync, rename, folder fsync.

    Raises:
        OutputError: the folder is read-only, missing, or the disk is full; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing_to(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            flush_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def _output_error(path: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free space there, or choose another output, and run the same command again"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "choose an output you may write to"
    else:
        remedy = "choose another output"
    return OutputError(
        f"it cannot be written ({reason})", where=path, expected="a writable folder with room", remedy=remedy
    )
