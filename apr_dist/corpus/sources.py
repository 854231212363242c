"""Where documents come from: files and folders into a fixed list of sources, sources into documents.

Lives here: naming and ordering the sources, and walking them from any position. How a format's bytes become
records lives in ``corpus_formats``; turning text into ids lives in ``encode``.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from apr_dist.corpus.formats import (
    STDIN,
    BadRecord,
    Document,
    Kind,
    Problem,
    Record,
    read_file,
)
from apr_dist.errors import CorpusError

__all__ = [
    "DEFAULT_GLOBS",
    "STDIN",
    "BadRecord",
    "CorpusReader",
    "Document",
    "Problem",
    "Record",
    "Source",
    "documents",
    "list_sources",
    "standard_library_sources",
]

# Of a folder, without globs of the user's: the formats that can only be meant as a corpus.
DEFAULT_GLOBS = (
    *(f"*{stem}{compression}" for stem in (".jsonl", ".txt") for compression in ("", ".gz", ".zst")),
    "*.parquet",
)

_KINDS = {".jsonl": Kind.JSONL, ".ndjson": Kind.JSONL, ".parquet": Kind.PARQUET}
_COMPRESSIONS = (".gz", ".zst")


@dataclass(frozen=True)
class Source:
    """One file of the corpus.

    Attributes:
        path: the file; ``STDIN`` for standard input, which is read as JSONL.
        kind: how its bytes become documents.
        bytes: its size on disk; 0 for standard input.
        modified_ns: its time of last change; 0 for standard input.
    """

    path: Path
    kind: Kind
    bytes: int
    modified_ns: int


def list_sources(paths: Sequence[Path], *, globs: Sequence[str] | None = None) -> list[Source]:
    """The files of the corpus in reading order: as given, and inside a folder by path.

    Args:
        paths: files, folders, or ``STDIN`` (``-``).
        globs: which files of a folder are taken, at any depth; None for ``DEFAULT_GLOBS``.

    Raises:
        CorpusError: a path is missing, a folder holds no file that matches, or a file is named twice.
    """
    sources: list[Source] = []
    for path in paths:
        if path == STDIN:
            sources.append(Source(path=STDIN, kind=Kind.JSONL, bytes=0, modified_ns=0))
        elif path.is_dir():
            sources += [_source(file) for file in _files_of(path, globs or DEFAULT_GLOBS)]
        else:
            sources.append(_source(path))
    seen: set[Path] = set()
    for source in sources:
        real = source.path if source.path == STDIN else source.path.resolve()
        if real in seen:
            raise CorpusError(
                "the corpus names this file twice", where=source.path, expected="each file once"
            )
        seen.add(real)
    if not sources:
        raise CorpusError("the corpus names no file", expected="at least one file or folder")
    return sources


class CorpusReader:
    """Every record of the corpus, good and bad, with its source's number, from a position onwards.

    Attributes:
        bytes_total: size of all sources on disk.
        bytes_at_start: of the sources before the first that is read.

    Args:
        sources: as ``list_sources`` gave them.
        text_key: JSON key or Parquet column of the text.
        start_source: number of the source to begin with.
        start_record: how many of its records are passed over.
    """

    def __init__(
        self, sources: Sequence[Source], *, text_key: str, start_source: int = 0, start_record: int = 0
    ) -> None:
        self._sources = sources
        self._text_key = text_key
        self._start = (start_source, start_record)
        self._open: BinaryIO | None = None
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
            skip = passed_over if number == first else 0
            for record in read_file(
                source.path, source.kind, text_key=self._text_key, skip=skip, on_open=self._remember
            ):
                yield number, record
            self._open = None
            self._finished += source.bytes

    def _remember(self, packed: BinaryIO) -> None:
        self._open = packed


def documents(
    paths: Sequence[Path], *, text_key: str = "content", globs: Sequence[str] | None = None
) -> Iterator[Document]:
    """The documents of files and folders, in a fixed order; the first bad record stops it.

    Raises:
        CorpusError: a path is missing or unreadable, or a record is bad, with file and line.
    """
    for _, record in CorpusReader(list_sources(paths, globs=globs), text_key=text_key):
        if isinstance(record, BadRecord):
            raise record.as_error()
        yield record


# Not the code a reader of the standard library means: its tests, and parts that not every machine installs.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "__pycache__"}


def standard_library_sources() -> list[Path]:
    """The running Python's own standard-library source files, without its tests, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    found = (path for path in root.rglob("*.py") if not _LEFT_OUT.intersection(path.relative_to(root).parts))
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def _files_of(folder: Path, globs: Sequence[str]) -> list[Path]:
    found = {path for pattern in globs for path in folder.rglob(pattern) if path.is_file()}
    if not found:
        present = sorted({path.suffix or path.name for path in folder.rglob("*") if path.is_file()})
        raise CorpusError(
            f"no file in the folder matches (it holds {', '.join(present[:8]) or 'nothing'})",
            where=folder,
            expected=f"files like {', '.join(globs)}",
            remedy="name the files you mean with --glob",
        )
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _source(path: Path) -> Source:
    try:
        facts = path.stat()
    except OSError as error:
        raise CorpusError(f"it cannot be read ({error.strerror})", where=path) from error
    plain = path.with_suffix("") if path.suffix in _COMPRESSIONS else path
    kind = _KINDS.get(plain.suffix, Kind.TEXT)
    return Source(path=path, kind=kind, bytes=facts.st_size, modified_ns=facts.st_mtime_ns)
