"""The encoder's journal: how far an unfinished data set has come, so that a killed run can go on.

One line an entry, appended and flushed to disk: the hash of a JSON text, and the text. First comes the
configuration, then the list of sources, then a commit a line. A line that is torn or damaged ends it,
and a commit counts only while the files hold what it acknowledged. What is in one is decided by ``encode``.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

import xxhash

from apr_dist.atomic_files import writing_to
from apr_dist.corpus.split_writer import OpenShard, is_closed_intact, is_open_intact
from apr_dist.data.manifest_file import Shard
from apr_dist.errors import OutputError
from apr_dist.parsing import parse_json

JOURNAL_NAME = "journal.jsonl"

_PUBLISHING = {"publishing": True}


def is_publishing(folder: Path) -> bool:
    """Whether the run in ``folder`` was broken off while it moved its finished files into place."""
    try:
        lines = (folder / JOURNAL_NAME).read_bytes().splitlines(keepends=True)
    except OSError:  # none there, or not readable: opening it says so
        return False
    return bool(lines) and lines[-1] == _line(_PUBLISHING)


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

    @property
    def is_empty(self) -> bool:
        """Nothing is encoded yet."""
        return not any(split.shards or split.open for split in self.splits.values())


@dataclass(frozen=True)
class _Commit:
    """One commit: where its line ends, and of each split how many shards were closed and what was open."""

    end: int
    line: dict[str, Any]
    closed: Mapping[str, int]
    opened: Mapping[str, OpenShard | None]


class Journal:
    """An open, locked journal in ``folder``; made when there is none.

    Attributes:
        folder: the work folder it lies in.
        progress: the state after the last commit that counts.
        publishing: everything is written and only has to be moved into place.
        lost: what was acknowledged and is damaged, so that it is done again; None when nothing is.

    Args:
        folder: the work folder of one output.
        configuration: everything but the sources that the result depends on.
        sources: one text a source, different when the source is.
        discard: drop the journal of another configuration instead of refusing.
        resumable: False starts again also from a journal of the same configuration (the input is a
            stream that cannot be read again).

    Raises:
        OutputError: another process is writing this output, or an interrupted run with another
            configuration, or of other sources, lies there.
    """

    progress: Progress
    publishing: bool

    def __init__(
        self,
        folder: Path,
        configuration: Mapping[str, object],
        sources: Sequence[str],
        *,
        discard: bool,
        resumable: bool,
    ) -> None:
        self.folder = folder
        self.lost: str | None = None
        self._path = folder / JOURNAL_NAME
        with writing_to(folder):
            self._file: IO[bytes] = self._path.open("a+b")
        try:
            self._lock()
            self._take_up(configuration, sources, discard=discard, resumable=resumable)
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

    def rewind_before(self, source: int) -> None:
        """Drop every commit that holds a record of ``source`` or of a later one."""
        commits, shards = self._commits()
        kept = list(takewhile(lambda commit: commit.line["source"] < source, commits))
        self._end_with(kept, shards)

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

    def _take_up(
        self, configuration: Mapping[str, object], sources: Sequence[str], *, discard: bool, resumable: bool
    ) -> None:
        """Go on from what the file says, or begin it."""
        lines = [line for _, line in self._lines()]
        self.publishing = _PUBLISHING in lines
        begun = bool(lines) and resumable
        if not lines and resumable and any(self.folder.glob("*/shard-*")):
            self._refuse_or_discard("its journal is damaged", discard=discard, has_work=True)
        if begun and lines[0] != json.loads(json.dumps(configuration)):
            begun = self._refuse_or_discard(_differing(lines[0], configuration), discard=discard)
        if begun:
            commits, shards = self._commits()
            self._end_with(self._intact(commits, shards), shards)
            recorded = [line["sources"] for line in lines if "sources" in line][-1:]
            changed = self._changed_source(recorded[0] if recorded else [], sources)
            if changed is not None:
                begun = self._refuse_or_discard(f"{changed} is another than it was", discard=discard)
            elif recorded != [list(sources)] and not self.publishing:
                self._append({"sources": list(sources)})
        if not begun:
            self._file.truncate(0)
            self._clear()
            self._append(configuration)
            self._append({"sources": list(sources)})
            self.progress, self.publishing = Progress(), False

    def _intact(self, commits: list[_Commit], shards: Mapping[str, list[Shard]]) -> list[_Commit]:
        """The commits up to the last one whose acknowledged files are as they were; all when publishing."""
        if self.publishing:
            return commits
        good = {
            name: sum(1 for _ in takewhile(lambda one: is_closed_intact(self.folder / name, one), closed))  # noqa: B023
            for name, closed in shards.items()
        }
        for count in range(len(commits), 0, -1):
            commit = commits[count - 1]
            if all(
                closed <= good[name]
                and (
                    (opened := commit.opened[name]) is None
                    or is_open_intact(self.folder / name, closed, opened)
                )
                for name, closed in commit.closed.items()
            ):
                break
        else:
            count = 0
        if count < len(commits):
            self.lost = f"{len(commits) - count} of {len(commits)} commits are damaged and are done again"
        return commits[:count]

    def _changed_source(self, recorded: Sequence[str], sources: Sequence[str]) -> str | None:
        """The first source that was read, at least in part, and is another now."""
        if self.progress.is_empty and not self.progress.record:
            return None
        read = self.progress.source + 1
        for before, now in zip(recorded[:read], [*sources, *[""] * read], strict=False):
            if before != now:
                return str(json.loads(before)["path"])
        return None

    def _end_with(self, commits: Sequence[_Commit], shards: Mapping[str, list[Shard]]) -> None:
        """Make ``commits`` the only ones, and ``progress`` what the last of them says."""
        if not self.publishing:
            end = commits[-1].end if commits else self._head_end()
            with writing_to(self._path):
                self._file.truncate(end)
        self.progress = Progress()
        if commits:
            last = commits[-1]
            self.progress = Progress(
                source=last.line["source"],
                record=last.line["record"],
                counts=last.line["counts"],
                splits={
                    name: SplitProgress(tuple(shards[name][:closed]), last.opened[name])
                    for name, closed in last.closed.items()
                },
            )

    def _head_end(self) -> int:
        """Where the lines before the first commit end."""
        head = takewhile(lambda entry: "splits" not in entry[1], self._lines())
        return max((end for end, _ in head), default=0)

    def _commits(self) -> tuple[list[_Commit], dict[str, list[Shard]]]:
        """Every commit, and by split the shards that they closed."""
        commits: list[_Commit] = []
        shards: dict[str, list[Shard]] = {}
        for end, line in self._lines():
            if "splits" not in line:
                continue
            opened = {}
            for name, split in line["splits"].items():
                shards.setdefault(name, []).extend(Shard(**one) for one in split["new_shards"])
                one = split["open"]
                opened[name] = OpenShard(**one | {"hashes": tuple(one["hashes"])}) if one else None
            closed = {name: len(shards[name]) for name in opened}
            position = {key: line[key] for key in ("source", "record", "counts")}
            commits.append(_Commit(end, position, closed, opened))
        return commits, shards

    def _clear(self) -> None:
        """Remove shards that an earlier run left and that nothing records any more."""
        with writing_to(self.folder):
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)

    def _refuse_or_discard(self, what: str, *, discard: bool, has_work: bool = False) -> bool:
        """Refuse, unless there is nothing to lose or losing it was asked for; then False: begin again."""
        if not discard and (has_work or self._commits()[0]):
            raise OutputError(
                f"an interrupted run with another configuration lies there ({what})",
                where=self._path.parent.parent,
                remedy="run the interrupted command again, or pass --force to drop what it had done",
            )
        return False

    def _lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The whole lines, each with where it ends; the first damaged one ends the journal."""
        self._file.seek(0)
        end = 0
        for raw in self._file:
            text = raw.partition(b" ")[2][:-1]
            if raw != _line(text):
                break
            end += len(raw)
            yield end, parse_json(text)

    def _append(self, entry: Mapping[str, object]) -> None:
        with writing_to(self._path):
            self._file.write(_line(entry))
            self._file.flush()
            os.fsync(self._file.fileno())


def _line(entry: Mapping[str, object] | bytes) -> bytes:
    """An entry as it stands in the file."""
    text = entry if isinstance(entry, bytes) else json.dumps(entry).encode()
    return b"%s %s\n" % (xxhash.xxh3_64_hexdigest(text).encode(), text)


def _differing(found: Mapping[str, object], expected: Mapping[str, object]) -> str:
    differing = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
    return f"{', '.join(differing)} differ"
