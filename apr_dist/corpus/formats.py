"""How bytes become documents: JSON lines, JSON arrays, plain text, Parquet and Arrow.

Lives here: one reader a format, in bounded memory, yielding a record for everything it meets, also for what
is no document (so that nothing is skipped in silence). Recognising a format lives in ``recognition``; which
files are read lives in ``sources``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from apr_dist.corpus.recognition import Kind, Packing, opened
from apr_dist.errors import CorpusError
from apr_dist.parsing import parse_json, printable

TEXT_KEYS = ("content", "text")
"""Keys looked for when none is named, in this order."""

# A document is tokenized and split as one; this bounds the memory that one can take.
MAX_DOCUMENT_BYTES = 16 * 2**20
# A JSON array cannot be read in parts.
MAX_ARRAY_BYTES = 256 * 2**20
_MISSING = object()


class Problem(Enum):
    """Why a record is no document."""

    MISSING_KEY = "missing key"
    BAD_LINE = "bad line"
    TOO_LARGE = "too large"
    EMPTY = "empty"


@dataclass(frozen=True)
class Document:
    """A text and where it came from.

    Attributes:
        text: never empty, valid Unicode.
        source: the file.
        line: from 1: line, row, number in an array; 1 for plain files.
        key: the JSON key or column of the text; empty for plain files.
    """

    text: str
    source: Path
    line: int
    key: str = ""


@dataclass(frozen=True)
class BadRecord:
    """A record that is no document, and why."""

    problem: Problem
    detail: str
    source: Path
    line: int

    def __str__(self) -> str:
        return f"{printable(self.source)}:{self.line}: {self.problem.value}: {self.detail}"

    def as_error(self) -> CorpusError:
        """The refusal that ``--strict`` raises."""
        return CorpusError(
            f"{self.problem.value}: {self.detail}",
            where=f"{printable(self.source)}:{self.line}",
            remedy="mend the record, or leave out --strict to have such records counted and passed over",
        )


Record: TypeAlias = Document | BadRecord


def read_file(
    path: Path,
    kind: Kind,
    packing: Packing = Packing.NONE,
    *,
    text_keys: Sequence[str],
    skip: int = 0,
    on_open: Callable[[BinaryIO], None] | None = None,
) -> Iterator[Record]:
    """The records of one file, without the first ``skip``.

    ``on_open`` gets the file as it lies on disk, whose position tells how much of it has been read.

    Raises:
        CorpusError: the file cannot be read, is not of its kind, or its compressed stream is damaged.
    """
    if kind in (Kind.PARQUET, Kind.ARROW):
        yield from islice(_table(path, kind, text_keys), skip, None)
        return
    with opened(path, packing, on_open) as file:
        if kind is Kind.TEXT:
            yield from islice(_text(path, file), skip, None)
        elif kind is Kind.JSON:
            yield from islice(_array(path, file, text_keys), skip, None)
        else:
            yield from _jsonl(path, file, text_keys, skip)


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


def _jsonl(path: Path, file: BinaryIO, text_keys: Sequence[str], skip: int) -> Iterator[Record]:
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
            yield _parse_line(raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw, text_keys, path, line)


def _parse_line(raw: bytes, text_keys: Sequence[str], path: Path, line: int) -> Record:
    try:
        fields = parse_json(raw.decode())
    except UnicodeDecodeError as error:
        return BadRecord(Problem.BAD_LINE, f"not UTF-8 at byte {error.start}", path, line)
    except ValueError as error:
        return BadRecord(Problem.BAD_LINE, f"not JSON ({error})", path, line)
    return _record_of(fields, text_keys, path, line)


def _array(path: Path, file: BinaryIO, text_keys: Sequence[str]) -> Iterator[Record]:
    """One record an element of a JSON array."""
    raw = file.read(MAX_ARRAY_BYTES + 1)
    if len(raw) > MAX_ARRAY_BYTES:
        raise CorpusError(
            f"it is a JSON array of more than {MAX_ARRAY_BYTES // 2**20} MiB, which is read as a whole",
            where=path,
            remedy="convert it to JSON lines: jq -c '.[]' FILE.json > FILE.jsonl",
        )
    try:
        elements = parse_json(raw.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        raise CorpusError(f"it is not JSON ({error})", where=path) from error
    if not isinstance(elements, list):
        raise CorpusError(
            f"it is a JSON {type(elements).__name__}", where=path, expected="an array of objects"
        )
    for line, fields in enumerate(elements, start=1):
        yield _record_of(fields, text_keys, path, line)


def _record_of(fields: object, text_keys: Sequence[str], path: Path, line: int) -> Record:
    if not isinstance(fields, dict):
        return BadRecord(Problem.BAD_LINE, f"a JSON {type(fields).__name__}, not an object", path, line)
    for key in text_keys:
        text = _look_up(fields, key)
        if text is not _MISSING:
            return _document(text, key, fields, path, line)
    return _document(None, " or ".join(text_keys), fields, path, line)


def _look_up(fields: Mapping[str, Any], key: str) -> object:
    """The value under ``key``, or under its parts between dots in nested objects."""
    if key in fields:
        return fields[key]
    value: object = fields
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _document(text: object, key: str, fields: Mapping[str, object], path: Path, line: int) -> Record:
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            return BadRecord(Problem.BAD_LINE, f"{key!r} is not UTF-8 at byte {error.start}", path, line)
    if text is None:
        return BadRecord(Problem.MISSING_KEY, f"no text under {key!r} ({_described(fields)})", path, line)
    if not isinstance(text, str):
        what = f"{key!r} is a {type(text).__name__}, not text ({_described(fields)})"
        return BadRecord(Problem.BAD_LINE, what, path, line)
    if not text:
        return BadRecord(Problem.EMPTY, f"no text under {key!r}", path, line)
    try:
        text.encode()  # at the speed of memory, and only half a surrogate pair cannot be encoded
    except UnicodeEncodeError:
        return BadRecord(Problem.BAD_LINE, "half a surrogate pair", path, line)
    return Document(text, path, line, key)


def _described(fields: Mapping[str, object]) -> str:
    """The keys that there are, each with the type of its value."""
    shown = [f"{key} ({type(value).__name__})" for key, value in islice(sorted(fields.items()), 8)]
    return f"keys: {', '.join(shown) or 'none'}"


def _table(path: Path, kind: Kind, text_keys: Sequence[str]) -> Iterator[Record]:
    """One record a row of a Parquet or Arrow table."""
    try:
        import pyarrow  # noqa: PLC0415  (an optional extra)
    except ImportError as error:
        raise CorpusError(
            f"reading {kind.value.title()} needs the pyarrow package",
            where=path,
            remedy="pip install 'apr-dist[parquet]'",
        ) from error
    try:
        with ExitStack() as stack:
            columns, batches = _batches(path, kind, text_keys, stack)
            line = 0
            for key, column in batches:
                for text in _values(column):
                    line += 1
                    yield _document(text, key, columns, path, line)
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"it is no readable {kind.value.title()} file ({error})", where=path) from error


def _batches(
    path: Path, kind: Kind, text_keys: Sequence[str], stack: ExitStack
) -> tuple[Mapping[str, object], Iterator[tuple[str, Any]]]:
    """Column types by name, and the text column in pieces, each with its key."""
    import pyarrow  # noqa: PLC0415  (an optional extra)
    from pyarrow import compute, ipc, parquet  # noqa: PLC0415

    if kind is Kind.PARQUET:
        table = stack.enter_context(parquet.ParquetFile(path))
        schema = table.schema_arrow
    else:
        file = stack.enter_context(pyarrow.OSFile(str(path)))
        in_blocks = file.read(6) == b"ARROW1"
        file.seek(0)
        table = stack.enter_context((ipc.open_file if in_blocks else ipc.open_stream)(file))
        schema = table.schema
    key = next((key for key in text_keys if key.split(".")[0] in schema.names or key in schema.names), None)
    if key is None:
        raise CorpusError(
            f"it has no column {' or '.join(repr(key) for key in text_keys)}",
            where=path,
            expected=f"one of its columns: {', '.join(schema.names)}",
            remedy="name the column of the text with --text-key",
        )
    if kind is Kind.PARQUET:
        pieces = table.iter_batches(batch_size=64, columns=[key], use_threads=False)
    elif in_blocks:
        pieces = (table.get_batch(number) for number in range(table.num_record_batches))
    else:
        pieces = iter(table)

    def texts() -> Iterator[tuple[str, Any]]:
        name, *inner = [key] if key in schema.names else key.split(".")
        for piece in pieces:
            column = piece.column(name)
            yield key, compute.struct_field(column, inner) if inner else column

    return dict.fromkeys(schema.names), texts()


def _values(column: Any) -> Iterator[object]:
    """The values of a column; text that is not UTF-8 comes as its bytes, so that only its row is at fault."""
    try:
        yield from column.to_pylist()
    except UnicodeDecodeError:
        import pyarrow  # noqa: PLC0415  (an optional extra)

        wide = pyarrow.types.is_large_string(column.type)
        yield from column.view(pyarrow.large_binary() if wide else pyarrow.binary()).to_pylist()


def _too_large(path: Path, line: int, advice: str) -> BadRecord:
    limit = MAX_DOCUMENT_BYTES // 2**20
    return BadRecord(Problem.TOO_LARGE, f"one document of more than {limit} MiB; {advice}", path, line)
