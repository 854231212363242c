"""Where documents come from: files and folders into a fixed list of sources, sources into documents.

Lives here: naming and ordering the sources, saying which files are left out, and walking the sources from any
position. How bytes become records lives in ``recognition`` and ``formats``; text becomes ids in ``encode``.
"""

from __future__ import annotations

import os
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from apr_dist.corpus.formats import (
    TEXT_KEYS,
    BadRecord,
    Document,
    Problem,
    ReadRecord,
    Record,
    read_file,
)
from apr_dist.corpus.publish import SOURCES_NAME, WORK_FOLDER
from apr_dist.corpus.recognition import STDIN, Kind, Packing, is_corpus_name, recognise
from apr_dist.data.manifest import MANIFEST_NAME
from apr_dist.errors import CorpusError
from apr_dist.parsing import printable

__all__ = [
    "STDIN",
    "BadRecord",
    "CorpusReader",
    "Document",
    "Problem",
    "Record",
    "Source",
    "Sources",
    "documents",
    "list_sources",
    "standard_library_sources",
]

_NAMED_IN_AN_ERROR = 8
_REPAIR = (
    "repair what cannot be read and run the same command again: what was encoded before it is kept."
    " Or leave it out with --skip-unreadable"
)


@dataclass(frozen=True)
class Source:
    """One file of the corpus.

    Attributes:
        path: the file; ``STDIN`` for standard input, which is read as JSONL.
        kind: how its bytes become documents.
        packing: how they are compressed.
        bytes: its size on disk; 0 for standard input.
        modified_ns: its time of last change; 0 for standard input.
    """

    path: Path
    kind: Kind
    packing: Packing
    bytes: int
    modified_ns: int

    def read(self) -> None:
        """Read all of it, to find whether it can be.

        Raises:
            CorpusError: it cannot.
        """
        for _ in read_file(self.path, self.kind, self.packing, text_keys=("",)):
            pass


@dataclass(frozen=True)
class Sources:
    """The files of a corpus in reading order, and those of its folders that are left out, with the reason."""

    files: tuple[Source, ...]
    left_out: dict[Path, str] = field(default_factory=dict)


def list_sources(
    paths: Sequence[Path],
    *,
    globs: Sequence[str] | None = None,
    output: Path | None = None,
    skip_unreadable: bool = False,
) -> Sources:
    """The files of the corpus in reading order: as given, and inside a folder by path.

    Args:
        paths: files, folders, or ``STDIN`` (``-``).
        globs: which files of a folder are taken, at any depth; None: those of the corpus formats.
        output: a data set's folder, whose own files are no corpus.
        skip_unreadable: leave out files that cannot be read; every file is read once to know.

    Raises:
        CorpusError: a path is missing or of no format that is read, a folder holds no file that is, or a
            file is named twice. All such files are named together.
    """
    files: list[Source] = []
    left_out: dict[Path, str] = {}
    refused: list[CorpusError] = []
    for path in paths:
        if path == STDIN:
            files.append(Source(STDIN, Kind.JSONL, Packing.NONE, bytes=0, modified_ns=0))
            continue
        inside = path.is_dir()
        found = _files_of(path, globs, output, left_out) if inside else [path]
        for one in found:
            try:
                source = _source(one)
                if skip_unreadable:
                    source.read()
                files.append(source)
            except CorpusError as error:
                if (skip_unreadable and one.exists()) or (
                    inside and globs is None and not _is_damaged(error)
                ):
                    left_out[one] = error.what
                else:
                    refused.append(error)
    refuse_all(refused)
    _refuse_twice(files)
    if not files:
        raise _nothing(paths, globs, left_out)
    return Sources(tuple(files), left_out)


def refuse_all(errors: Sequence[CorpusError]) -> None:
    """Raise one error that names everything that cannot be read, or none.

    Raises:
        CorpusError: there was at least one.
    """
    if len(errors) == 1:
        errors[0].remedy = errors[0].remedy or _REPAIR
        raise errors[0]
    if errors:
        named = "; ".join(f"{printable(str(one.where))}: {one.what}" for one in errors[:_NAMED_IN_AN_ERROR])
        more = f"; and {len(errors) - _NAMED_IN_AN_ERROR} more" if len(errors) > _NAMED_IN_AN_ERROR else ""
        raise CorpusError(
            f"{len(errors)} files cannot be read: {named}{more}",
            expected=errors[0].expected,
            remedy=_REPAIR,
        )


class CorpusReader:
    """Every record of the corpus, good and bad, with its source's number, from a position onwards.

    Attributes:
        bytes_total: size of all sources on disk.
        bytes_at_start: of the sources before the first that is read.
        source: number of the source that is being read.

    Args:
        sources: as ``list_sources`` gave them.
        text_key: JSON key or column of the text; None: the first of ``TEXT_KEYS`` that a record has.
        read: makes records of whole JSON values and rows instead.
        start_source: number of the source to begin with.
        start_record: how many of its records are skipped.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        text_key: str | None = None,
        read: ReadRecord | None = None,
        start_source: int = 0,
        start_record: int = 0,
    ) -> None:
        self._sources, self._read = sources, read
        self._text_keys = TEXT_KEYS if text_key is None else (text_key,)
        self._start = (start_source, start_record)
        self._open: BinaryIO | None = None
        self.source = start_source
        self.bytes_total = sum(source.bytes for source in sources)
        self.bytes_at_start = self._finished = sum(source.bytes for source in sources[:start_source])

    @property
    def bytes_done(self) -> int:
        """Bytes of the sources, as they lie on disk, that have been read."""
        if self._open is None or self._open.closed:
            return self._finished
        return self._finished + self._open.tell()

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        """Walk the records.

        Raises:
            CorpusError: a source cannot be read at all, or ends in the middle of its compressed stream.
        """
        first, passed_over = self._start
        for number in range(first, len(self._sources)):
            source = self._sources[number]
            self.source = number
            skip = passed_over if number == first else 0
            records = read_file(
                source.path,
                source.kind,
                source.packing,
                text_keys=self._text_keys,
                read=self._read,
                skip=skip,
                on_open=self._remember,
            )
            for record in records:
                yield number, record
            self._open = None
            self._finished += source.bytes

    def _remember(self, packed: BinaryIO) -> None:
        self._open = packed


def documents(
    paths: Sequence[Path], *, text_key: str | None = None, globs: Sequence[str] | None = None
) -> Iterator[Document]:
    """The documents of files and folders, in a fixed order; the first bad record stops it.

    Raises:
        CorpusError: a path is missing or unreadable, or a record is bad, with file and line.
    """
    for _, record in CorpusReader(list_sources(paths, globs=globs).files, text_key=text_key):
        if isinstance(record, BadRecord):
            raise record.as_error()
        yield record


# Not the code a reader of the standard library means: its tests, and parts that not every machine installs.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "__pycache__"}


def standard_library_sources() -> list[Path]:
    """The running Python's own standard-library source files, without its tests, sorted by path.

    Some distributions link one file of it to another; the link is left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = (path for path in root.rglob("*.py") if not _LEFT_OUT.intersection(path.relative_to(root).parts))
    files = sorted(found, key=lambda path: path.relative_to(root).parts)
    own = {path.resolve() for path in files if not path.is_symlink()}
    return [path for path in files if not path.is_symlink() or path.resolve() not in own]


def _files_of(
    folder: Path, globs: Sequence[str] | None, output: Path | None, left_out: dict[Path, str]
) -> list[Path]:
    """The files of a folder that are taken, linked folders included; the others go to ``left_out``."""
    taken = []
    for path in _walk(folder):
        if _is_of_a_data_set(path, output):
            left_out[path] = "a file of a data set"
        elif globs is not None:
            if any(path.match(pattern) for pattern in globs):
                taken.append(path)
        elif is_corpus_name(path):
            taken.append(path)
        else:
            left_out[path] = f"{path.suffix or path.name} is no corpus format"
    return sorted(taken, key=lambda path: path.relative_to(folder).parts)


def _walk(folder: Path) -> Iterator[Path]:
    """Every file at any depth; a folder that links lead to more than once is walked once."""
    walked: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in walked:
            folders.clear()
            continue
        walked.add(real)
        folders.sort()  # which of two ways to a folder is taken must not depend on the file system
        yield from (path for name in files if (path := Path(root, name)).is_file())


def _is_of_a_data_set(path: Path, output: Path | None) -> bool:
    """A file that encoding wrote: work in progress, a manifest, a source list, shards and their sidecars."""
    if WORK_FOLDER in path.parts:
        return True
    if path.name not in (MANIFEST_NAME, SOURCES_NAME):
        return path.name.startswith("shard-") and path.suffix in (".bin", ".idx", ".docs")
    if output is not None and path.parent.resolve() in (
        output.resolve() / part for part in ("", "train", "validation")
    ):
        return True
    try:
        return b'"shard_count"' in (path.parent / MANIFEST_NAME).read_bytes()[:4096]
    except OSError:
        return False


def _is_damaged(error: CorpusError) -> bool:
    """Whether a file is of a known format and cannot be read, which its owner will want to know."""
    return error.__cause__ is not None or "damaged" in error.what


def _refuse_twice(files: Sequence[Source]) -> None:
    seen: set[Path] = set()
    for source in files:
        real = source.path if source.path == STDIN else source.path.resolve()
        if real in seen:
            raise CorpusError(
                "the corpus names this file twice", where=source.path, expected="each file once"
            )
        seen.add(real)


def _nothing(paths: Sequence[Path], globs: Sequence[str] | None, left_out: dict[Path, str]) -> CorpusError:
    if not paths:
        return CorpusError("the corpus names no file", expected="at least one file or folder")
    present = sorted({path.suffix or path.name for path in left_out})
    return CorpusError(
        f"no file in the folder matches (it holds {', '.join(present[:8]) or 'nothing'})",
        where=paths[0],
        expected=f"files like {', '.join(globs)}" if globs else "JSON, text, Parquet or Arrow files",
        remedy="name the files you mean with --glob",
    )


def _source(path: Path) -> Source:
    try:
        facts = path.stat()
    except OSError as error:
        raise CorpusError(
            f"it cannot be read ({error.strerror})", where=path, remedy="check the path and its permissions"
        ) from error
    if not stat.S_ISREG(
        facts.st_mode
    ):  # a pipe can be read only once, and this look would take its beginning
        raise CorpusError(
            "it is no regular file", where=path, remedy="give JSON lines on standard input with --corpus -"
        )
    kind, packing = recognise(path)
    return Source(path=path, kind=kind, packing=packing, bytes=facts.st_size, modified_ns=facts.st_mtime_ns)
