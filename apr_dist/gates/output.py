"""Gate: the run folder is free, writable, and has room for what the run will write."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from apr_dist.atomic_files import is_temporary
from apr_dist.errors import OutputError

OCCUPIED = "FALSIFY-APR-DIST-CHECKPOINT-003"
NO_ROOM = "FALSIFY-APR-DIST-CHECKPOINT-004"


def check_run_dir(folder: Path, *, overwrite: bool, needed_bytes: int, ignored: Collection[str] = ()) -> None:
    """Refuse before anything is trained what would fail after; creates nothing.

    What a process that was killed left unfinished does not make a folder occupied.

    Args:
        folder: the run folder, which may not exist yet.
        overwrite: whether files of an earlier run may be replaced.
        needed_bytes: what the step folders take while one more than is kept is being written.
        ignored: names of files that do not make the folder occupied.

    Raises:
        OutputError: a file stands there, it is occupied, not writable, or the disk is too full.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(
            "is a file", where=folder, expected="a folder or nothing", remedy="choose another --run-dir"
        )
    found = folder.iterdir() if folder.is_dir() else ()
    if not overwrite and not all(is_temporary(path) or path.name in ignored for path in found):
        raise OutputError(
            "already holds files",
            where=folder,
            expected="a new or empty folder",
            remedy="choose another --run-dir, or pass --overwrite to replace that run",
            falsifier=OCCUPIED,
        )
    standing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if (
        not os.access(standing, os.W_OK | os.X_OK, effective_ids=True)
        or os.statvfs(standing).f_flag & os.ST_RDONLY
    ):
        raise OutputError(
            "is not writable", where=standing, expected="a writable folder", remedy="choose another --run-dir"
        )
    free = shutil.disk_usage(standing).free
    if free < needed_bytes:
        raise OutputError(
            f"{free / 1e6:,.0f} MB are free and saving needs {needed_bytes / 1e6:,.0f} MB",
            where=standing,
            expected="room for the step folders that are kept and the one being written",
            remedy="free space or choose a --run-dir on another disk",
            falsifier=NO_ROOM,
        )


def create_run_dir(folder: Path) -> None:
    """Make the run folder once every gate has passed.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot be created ({error.strerror})",
            where=folder,
            expected="a writable parent folder",
            remedy="choose another --run-dir",
        ) from error
