"""The encoder's journal: how far an unfinished data set has come, so that a killed run can go on.

One JSON object a line, appended and flushed to disk: first the configuration, then a line a commit. A torn
last line is what a kill leaves and is ignored. What is in a commit is decided by ``encode``.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from apr_dist.atomic_files import writing_to
from apr_dist.corpus.split_writer import OpenShard
from apr_dist.data.manifest_file import Shard
from apr_dist.errors import OutputError
from apr_dist.parsing import parse_json

JOURNAL_NAME = "journal.jsonl"


_PUBLISHING = {"publishing": True}


def is_publishing(folder: Path) -> bool:
    """Whether the run in ``folder`` was broken off while it moved its finished files into place."""
    try:
        lines = (folder / JOURNAL_NAME).read_bytes().splitlines()
    except OSError:  # none there, or not readable: opening it says so
        return False
    return bool(lines) and lines[-1] == json.dumps(_PUBLISHING).encode()


@dataclass(frozen=True)
class SplitProgress:
    """What one split has on disk: its closed shards and how much of the open one is committed."""

    shards: tuple[Shard, ...] = ()
    open: OpenShard | None = None


@dataclass(frozen=True)
class Progress:
    """Everything a killed run needs to go on.

    Attributes:
        source: number of the source that is being read.
        record: records of it that are done.
        counts: documents and problems so far, by name.
        splits: by split name.
    """

    source: int = 0
    record: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    splits: Mapping[str, SplitProgress] = field(default_factory=dict)


class Journal:
    """An open, locked journal in ``folder``; made when there is none.

    Attributes:
        folder: the work folder it lies in.
        progress: the state after the last commit.
        publishing: everything is written and only has to be moved into place.

    Args:
        folder: the work folder of one output.
        configuration: everything that the result depends on.
        discard: drop the journal of another configuration instead of refusing.
        resumable: False starts anew also from a journal of the same configuration (the input is a
            stream that cannot be read again).

    Raises:
        OutputError: another process is writing this output, or an interrupted run with another
            configuration lies there.
    """

    progress: Progress
    publishing: bool

    def __init__(
        self, folder: Path, configuration: Mapping[str, object], *, discard: bool, resumable: bool
    ) -> None:
        self.folder = folder
        self._path = folder / JOURNAL_NAME
        with writing_to(folder):
            self._file: IO[bytes] = self._path.open("a+b")
        try:
            self._lock()
            self._take_up(configuration, discard=discard, resumable=resumable)
        except BaseException:
            self._file.close()
            raise

    def commit(self, progress: Progress) -> None:
        """Append one commit: shards closed since the last one, and the position."""
        splits = {}
        for name, split in progress.splits.items():
            known = len(self.progress.splits[name].shards) if name in self.progress.splits else 0
            splits[name] = {
                "new_shards": [asdict(shard) for shard in split.shards[known:]],
                "open": asdict(split.open) if split.open else None,
            }
        position = {"source": progress.source, "record": progress.record}
        self._append(position | {"counts": dict(progress.counts), "splits": splits})
        self.progress = progress

    def mark_publishing(self) -> None:
        """From here on the data set is complete and only has to be moved into place."""
        self._append(_PUBLISHING)
        self.publishing = True

    def close(self) -> None:
        """Release the lock."""
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError("another process is encoding into it", where=self.folder.parent) from error

    def _take_up(self, configuration: Mapping[str, object], *, discard: bool, resumable: bool) -> None:
        """Go on from what the file says, or begin it."""
        lines = self._read()
        if lines and lines[0] != json.loads(json.dumps(configuration)):
            self._refuse_or_discard(lines[0], configuration, discard=discard)
            lines = []
        if not resumable:
            self._file.truncate(0)
            lines = []
        if not lines:
            self._clear()
            self._append(configuration)
        self.publishing = any("publishing" in line for line in lines)
        self.progress = Progress()
        for line in lines[1:]:
            if "publishing" not in line:
                self.progress = _after(self.progress, line)

    def _clear(self) -> None:
        """Remove shards that an earlier run left and that nothing records any more."""
        with writing_to(self.folder):
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)

    def _refuse_or_discard(
        self, found: Mapping[str, object], wanted: Mapping[str, object], *, discard: bool
    ) -> None:
        if not discard:
            differing = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
            raise OutputError(
                f"an interrupted run with another configuration lies there ({', '.join(differing)} differ)",
                where=self._path.parent.parent,
                remedy="run the interrupted command again, or pass --force to drop what it had done",
            )
        self._file.truncate(0)

    def _read(self) -> list[dict[str, object]]:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        self._file.truncate(whole)
        return [parse_json(line) for line in content[:whole].splitlines()]

    def _append(self, line: Mapping[str, object]) -> None:
        with writing_to(self._path):
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def _after(progress: Progress, line: dict[str, object]) -> Progress:
    """``progress`` advanced by one commit as ``Journal.commit`` wrote it."""
    splits = {}
    for name, split in line["splits"].items():  # type: ignore[attr-defined]
        before = progress.splits[name].shards if name in progress.splits else ()
        splits[name] = SplitProgress(
            shards=before + tuple(Shard(**shard) for shard in split["new_shards"]),
            open=OpenShard(**split["open"]) if split["open"] else None,
        )
    return Progress(
        source=int(str(line["source"])),
        record=int(str(line["record"])),
        counts=dict(line["counts"]),  # type: ignore[call-overload]
        splits=splits,
    )
