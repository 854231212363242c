"""How bytes become documents: JSONL, plain text and Parquet, plain or compressed, in bounded memory.

Lives here: one reader a format, yielding a record for everything it meets, also for what is no document
(so that nothing is skipped in silence). Which files are read lives in ``corpus``.
"""

from __future__ import annotations

import gzip
import importlib
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, TypeAlias, cast

from apr_dist.errors import CorpusError
from apr_dist.parsing import parse_json

STDIN = Path("-")
# A document is tokenized and split as one; this bounds the memory that one can take.
MAX_DOCUMENT_BYTES = 16 * 2**20


class Kind(Enum):
    """What a file's bytes are, after decompression."""

    JSONL = "jsonl"
    TEXT = "text"
    PARQUET = "parquet"


class Problem(Enum):
    """Why a record is no document."""

    MISSING_KEY = "missing key"
    BAD_LINE = "bad line"
    TOO_LARGE = "too large"
    EMPTY = "empty"


@dataclass(frozen=True)
class Document:
    """A text and where it came from; ``line`` counts from 1 (JSONL line, Parquet row, 1 for plain files)."""

    text: str
    source: Path
    line: int


@dataclass(frozen=True)
class BadRecord:
    """A record that is no document, and why."""

    problem: Problem
    detail: str
    source: Path
    line: int

    def as_error(self) -> CorpusError:
        """The refusal that ``--strict`` raises."""
        return CorpusError(
            f"{self.problem.value}: {self.detail}",
            where=f"{self.source}:{self.line}",
            remedy="mend the record, or leave out --strict to have such records counted and passed over",
        )


Record: TypeAlias = Document | BadRecord


def read_file(
    path: Path, kind: Kind, *, text_key: str, skip: int = 0, on_open: Callable[[BinaryIO], None] | None = None
) -> Iterator[Record]:
    """The records of one file, without the first ``skip``.

    ``on_open`` gets the file as it lies on disk, whose position tells how much of it has been read.

    Raises:
        CorpusError: the file cannot be read, is not of its kind, or its compressed stream is damaged.
    """
    if kind is Kind.PARQUET:
        yield from islice(_parquet(path, text_key), skip, None)
        return
    with _opened(path, on_open) as file:
        if kind is Kind.TEXT:
            yield from islice(_text(path, file), skip, None)
        else:
            yield from _jsonl(path, file, text_key, skip)


@contextmanager
def _opened(path: Path, on_open: Callable[[BinaryIO], None] | None) -> Iterator[BinaryIO]:
    """The decompressed bytes of ``path``; damage met while reading becomes a ``CorpusError``."""
    if path == STDIN:
        yield sys.stdin.buffer
        return
    try:
        with ExitStack() as stack:
            packed = stack.enter_context(path.open("rb"))
            if on_open is not None:
                on_open(packed)
            if path.suffix == ".gz":
                yield cast(BinaryIO, stack.enter_context(gzip.open(packed, "rb")))
            elif path.suffix == ".zst":
                yield cast(BinaryIO, stack.enter_context(_zstd().open(packed, "rb")))
            else:
                yield packed
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(f"its compressed stream is damaged ({error})", where=path) from error
    except OSError as error:
        raise CorpusError(f"it cannot be read ({error.strerror or error})", where=path) from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # its class is known only once its optional package is there
            raise
        raise CorpusError(f"its compressed stream is damaged ({error})", where=path) from error


def _zstd() -> ModuleType:
    """The standard library's zstd (Python 3.14), or its backport."""
    for name in ("compression.zstd", "backports.zstd"):
        with suppress(ImportError):
            return importlib.import_module(name)
    raise CorpusError("reading zstd needs the backports.zstd package", remedy="pip install 'apr-dist[zstd]'")


def _text(path: Path, file: BinaryIO) -> Iterator[Record]:
    raw = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(raw) > MAX_DOCUMENT_BYTES:
        yield _too_large(path, 1, "split the file, or give its documents as JSONL")
        return
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        yield BadRecord(Problem.BAD_LINE, f"not UTF-8 at byte {error.start}", path, 1)
        return
    yield Document(text, path, 1) if text else BadRecord(Problem.EMPTY, "no text", path, 1)


def _jsonl(path: Path, file: BinaryIO, text_key: str, skip: int) -> Iterator[Record]:
    """One record a line that is not blank; ``skip`` counts records, so blank lines are passed over first."""
    line = 0
    while raw := file.readline(MAX_DOCUMENT_BYTES + 1):
        line += 1
        whole = len(raw) <= MAX_DOCUMENT_BYTES
        while not whole and raw and not raw.endswith(b"\n"):
            raw = file.readline(MAX_DOCUMENT_BYTES)
        if whole and raw.isspace():
            continue
        if skip:
            skip -= 1
        elif not whole:
            yield _too_large(path, line, "split the document")
        else:
            yield _parse_line(raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw, text_key, path, line)


def _parse_line(raw: bytes, text_key: str, path: Path, line: int) -> Record:
    try:
        fields = parse_json(raw.decode())
    except UnicodeDecodeError as error:
        return BadRecord(Problem.BAD_LINE, f"not UTF-8 at byte {error.start}", path, line)
    except ValueError as error:
        return BadRecord(Problem.BAD_LINE, f"not JSON ({error})", path, line)
    if not isinstance(fields, dict):
        return BadRecord(Problem.BAD_LINE, f"a JSON {type(fields).__name__}, not an object", path, line)
    return _document(fields.get(text_key), text_key, sorted(fields), path, line)


def _document(text: object, text_key: str, keys: list[str], path: Path, line: int) -> Record:
    if text is None:
        return BadRecord(
            Problem.MISSING_KEY, f"no text under {text_key!r} (keys: {', '.join(keys[:8])})", path, line
        )
    if not isinstance(text, str):
        return BadRecord(Problem.BAD_LINE, f"{text_key!r} is a {type(text).__name__}, not text", path, line)
    if not text:
        return BadRecord(Problem.EMPTY, f"no text under {text_key!r}", path, line)
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        return BadRecord(Problem.BAD_LINE, "half a surrogate pair", path, line)
    return Document(text, path, line)


def _parquet(path: Path, text_key: str) -> Iterator[Record]:
    try:
        import pyarrow  # noqa: PLC0415  (an optional extra)
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise CorpusError(
            "reading Parquet needs the pyarrow package", where=path, remedy="pip install 'apr-dist[parquet]'"
        ) from error
    try:
        with parquet.ParquetFile(path) as table:
            columns = table.schema_arrow.names
            if text_key not in columns:
                raise CorpusError(
                    f"it has no column {text_key!r}",
                    where=path,
                    expected=f"one of its columns: {', '.join(columns)}",
                    remedy="name the column of the text with --text-key",
                )
            line = 0
            for batch in table.iter_batches(batch_size=64, columns=[text_key], use_threads=False):
                for text in batch.column(0).to_pylist():
                    line += 1
                    yield _document(text, text_key, columns, path, line)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"it is no readable Parquet file ({error})", where=path) from error


def _too_large(path: Path, line: int, advice: str) -> BadRecord:
    limit = MAX_DOCUMENT_BYTES // 2**20
    return BadRecord(Problem.TOO_LARGE, f"one document of more than {limit} MiB; {advice}", path, line)
