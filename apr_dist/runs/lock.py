"""The lock on a run folder: one process writes into it at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from typing import IO, Self

from apr_dist.errors import OutputError
from apr_dist.runs.folder import RunFolder

IN_USE = "FALSIFY-APR-DIST-CHECKPOINT-011"
"""Falsifier of a second process in a run folder."""

WAIT_S = 0.5
"""How long a process that was just told to end may still have the lock."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


class RunLock:
    """An exclusive lock on ``run.lock``, held until it is released or the process ends, however it ends.

    Args:
        run: the run folder.
        warn: called if the file system has no locks.
    """

    def __init__(self, run: RunFolder, warn: Callable[[str], None]) -> None:
        self._run, self._warn = run, warn
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Lock the folder; does nothing if it does not exist yet, or if this object has the lock.

        Raises:
            OutputError: another process has it, named with its host; or the file cannot be written.
        """
        if self._file is not None or not self._run.path.is_dir():
            return
        deadline = time.monotonic() + WAIT_S
        while (file := self._try()) is None:
            if time.monotonic() > deadline:
                raise self._in_use()
            time.sleep(0.05)
        self._file = file
        file.seek(0)
        file.truncate()
        json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
        file.flush()

    def release(self) -> None:
        """Give the folder free; calling it twice does nothing."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                self._run.lock.unlink()  # while it is locked: whoever waits for this file looks again
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _try(self) -> IO[str] | None:
        """The locked file, or None while another process has it."""
        try:
            file = self._run.lock.open("a+", encoding="utf-8")
        except OSError as error:
            raise OutputError(
                f"cannot be written ({error.strerror})",
                where=self._run.lock,
                expected="a writable run folder",
                remedy="choose another --run-dir",
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_ino == self._run.lock.stat().st_ino:
                return file
        except BlockingIOError:
            pass
        except FileNotFoundError:  # released and removed between the two calls
            pass
        except OSError as error:
            if error.errno in _NO_LOCKS:
                self._warn(f"{self._run.path}: this file system has no locks; start no second run in it")
                return file
            file.close()
            raise
        file.close()
        return None

    def _in_use(self) -> OutputError:
        holder = ""
        with contextlib.suppress(OSError, ValueError, KeyError):
            found = json.loads(self._run.lock.read_text(encoding="utf-8"))
            holder = f" (process {found['pid']} on {found['host']})"
        return OutputError(
            f"another run is training into this folder{holder}",
            where=self._run.path,
            expected="one run per folder",
            remedy="wait for it or stop it, or choose another --run-dir",
            falsifier=IN_USE,
        )
