"""The proof that every rank sees one and the same run folder, and may write in it.

Ranks on other machines write their part of each save there. A folder that is only of the same name, on a
disk of its own, would leave a save in halves that nobody could go on from; so it is asked before training.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from pathlib import Path

from apr_dist.atomic_files import temporary_beside, writing_to
from apr_dist.errors import OutputError
from apr_dist.parallel.agreement import first_note
from apr_dist.parallel.heartbeat import HERE
from apr_dist.parallel.runtime import Runtime

NOT_ONE_FOLDER = "FALSIFY-APR-DIST-DISTRIBUTED-023"
"""Falsifier of a run folder that is not the same for every rank."""

SEEN_WITHIN_S = 5.0
"""How long a file that one machine wrote may take to be seen by another: network file systems cache."""


def prove_shared(folder: Path, runtime: Runtime) -> None:
    """Let rank 0 leave a word in the run folder, and every other rank find it there; a collective.

    The folder is made if it was not there; whoever refuses leaves nothing in it.

    Args:
        folder: as this rank's own configuration names it.
        runtime: this rank's view of the run.

    Raises:
        OutputError: on every rank, naming the first rank, with its host, that sees another folder or may
            not write in this one; or rank 0 cannot make the folder.
    """
    if runtime.world_size == 1:
        return
    left: dict[str, str] = runtime.on_main(lambda: _leave_word(folder))
    note = "" if runtime.is_main else _look(folder / left["name"], left["word"], runtime.rank)
    first, said = first_note(note, runtime)
    if runtime.is_main:
        with contextlib.suppress(OSError):
            (folder / left["name"]).unlink()
        with contextlib.suppress(OSError):
            if said:
                folder.rmdir()  # which refuses where anything is in it
    if not said:
        return
    error = OutputError(
        said,
        where=left["folder"],
        expected="one run folder that every rank sees and may write in",
        remedy="put --run-dir on storage that all machines share, under the same path on each of them",
        falsifier=NOT_ONE_FOLDER,
    )
    error.told_by_rank_0 = not runtime.is_main
    error.facts["failed_rank"] = first
    raise error


def _leave_word(folder: Path) -> dict[str, str]:
    word, name = secrets.token_hex(16), temporary_beside(folder / "seen-by-all").name
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(word, encoding="utf-8")
    return {"folder": str(folder.absolute()), "name": name, "word": word}


def _look(path: Path, word: str, rank: int) -> str:
    """What is wrong with this rank's folder; nothing where ``path`` holds the word of rank 0."""
    here = f"rank {rank} on host {socket.gethostname()}"
    deadline = time.monotonic() + SEEN_WITHIN_S
    while _read(path) != word:
        if time.monotonic() > deadline:
            return f"{here} does not find in {path.parent.absolute()} what rank 0 wrote there"
        time.sleep(0.1)
        HERE.moved()
    mine = temporary_beside(path)
    try:
        mine.touch(exist_ok=False)
        mine.unlink()
    except OSError as error:
        return f"{here} cannot write in {path.parent.absolute()} ({error.strerror})"
    return ""


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
