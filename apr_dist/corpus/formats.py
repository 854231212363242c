"""How bytes become documents: JSON lines, JSON arrays, plain text, Parquet and Arrow.

Lives here: one reader a format, in bounded memory, yielding a record for everything it meets, also for what
is no document (so that nothing is skipped in silence). Recognising a format lives in ``recognition``; which
files are read lives in ``sources``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from functools import partial
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
    BAD_CONVERSATION = "bad conversation"
    NO_TARGETS = "without targets"


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
    """A record that is no document, why, and the refusal in full where there is one."""

    problem: Problem
    detail: str
    source: Path
    line: int
    error: CorpusError | None = None

    def __str__(self) -> str:
        return f"{printable(self.source)}:{self.line}: {self.problem.value}: {self.detail}"

    def as_error(
        self, remedy: str = "correct the record, or leave out --strict to skip such records"
    ) -> CorpusError:
        """The refusal of a corpus with such a record."""
        where = f"{printable(self.source)}:{self.line}"
        return self.error or CorpusError(f"{self.problem.value}: {self.detail}", where=where, remedy=remedy)


Record: TypeAlias = Document | BadRecord
ReadRecord: TypeAlias = Callable[[object, Path, int], Record]
"""Makes a record of a JSON value or a table's row; gets its file and its line."""

CHAT_KEYS = (("messages",), ("conversations",), ("instruction", "output"), ("prompt", "completion"))
"""Keys of conversations, which another verb encodes."""


def read_file(
    path: Path,
    kind: Kind,
    packing: Packing = Packing.NONE,
    *,
    text_keys: Sequence[str],
    read: ReadRecord | None = None,
    skip: int = 0,
    on_open: Callable[[BinaryIO], None] | None = None,
) -> Iterator[Record]:
    """The records of one file, without the first ``skip``.

    ``read`` makes them of whole JSON values and rows; without it they are the texts under ``text_keys``.
    ``on_open`` gets the file as it lies on disk, whose position tells how much of it has been read.

    Raises:
        CorpusError: the file cannot be read, is not of its kind, or its compressed stream is damaged.
    """
    if kind in (Kind.PARQUET, Kind.ARROW):
        yield from islice(_table(path, kind, text_keys, read), skip, None)
        return
    read_value = read or partial(_record_of, text_keys)
    with opened(path, packing, on_open) as file:
        if kind is Kind.TEXT:
            yield from islice(_text(path, file, read), skip, None)
        elif kind is Kind.JSON:
            yield from islice(_array(path, file, read_value), skip, None)
        else:
            yield from _jsonl(path, file, read_value, skip)


def _text(path: Path, file: BinaryIO, read: ReadRecord | None) -> Iterator[Record]:
    raw = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(raw) > MAX_DOCUMENT_BYTES:
        yield _too_large(path, 1, "split the file, or give its documents as JSONL")
        return
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        yield BadRecord(Problem.BAD_LINE, f"not UTF-8 at byte {error.start}", path, 1)
        return
    if read is not None:
        yield read(text, path, 1)
        return
    yield Document(text, path, 1) if text else BadRecord(Problem.EMPTY, "no text", path, 1)


def _jsonl(path: Path, file: BinaryIO, read: ReadRecord, skip: int) -> Iterator[Record]:
    """One record a line that is not blank; ``skip`` counts records, so blank lines are skipped first."""
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
            yield _parse_line(raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw, read, path, line)


def _parse_line(raw: bytes, read: ReadRecord, path: Path, line: int) -> Record:
    try:
        fields = parse_json(raw.decode())
    except UnicodeDecodeError as error:
        return BadRecord(Problem.BAD_LINE, f"not UTF-8 at byte {error.start}", path, line)
    except ValueError as error:
        return BadRecord(Problem.BAD_LINE, f"not JSON ({error})", path, line)
    return read(fields, path, line)


def _array(path: Path, file: BinaryIO, read: ReadRecord) -> Iterator[Record]:
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
        yield read(fields, path, line)


def _record_of(text_keys: Sequence[str], fields: object, path: Path, line: int) -> Record:
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
    """The keys that there are, each with the type of its value if that is known."""
    shown = [
        key if value is None else f"{key} ({type(value).__name__})"
        for key, value in islice(sorted(fields.items(), key=lambda item: item[0]), 8)
    ]
    return f"keys: {', '.join(shown) or 'none'}{for_chats(fields)}"


def _table(path: Path, kind: Kind, text_keys: Sequence[str], read: ReadRecord | None) -> Iterator[Record]:
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
            schema, pieces = _pieces(path, kind, stack)
            line = 0
            if read is not None:
                for piece in pieces(None):
                    for row in piece.to_pylist():
                        line += 1
                        yield read(row, path, line)
                return
            key = _text_column(schema.names, text_keys, path)
            for column in _columns(schema.names, key, pieces):
                for text in _values(column):
                    line += 1
                    yield _document(text, key, dict.fromkeys(schema.names), path, line)
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"it is no readable {kind.value.title()} file ({error})", where=path) from error


def _pieces(
    path: Path, kind: Kind, stack: ExitStack
) -> tuple[Any, Callable[[list[str] | None], Iterator[Any]]]:
    """The schema of a table, and what gives its rows in pieces, with those columns or all."""
    import pyarrow  # noqa: PLC0415  (an optional extra)
    from pyarrow import ipc, parquet  # noqa: PLC0415

    if kind is Kind.PARQUET:
        table = stack.enter_context(parquet.ParquetFile(path))
        return table.schema_arrow, lambda columns: table.iter_batches(64, columns=columns, use_threads=False)
    file = stack.enter_context(pyarrow.OSFile(str(path)))
    in_blocks = file.read(6) == b"ARROW1"
    file.seek(0)
    table = stack.enter_context((ipc.open_file if in_blocks else ipc.open_stream)(file))
    if in_blocks:
        return table.schema, lambda _: (table.get_batch(one) for one in range(table.num_record_batches))
    return table.schema, lambda _: iter(table)


def _text_column(names: Sequence[str], text_keys: Sequence[str], path: Path) -> str:
    key = next((key for key in text_keys if key.split(".")[0] in names or key in names), None)
    if key is None:
        raise CorpusError(
            f"it has no column {' or '.join(repr(key) for key in text_keys)}",
            where=path,
            expected=f"one of its columns: {', '.join(names)}",
            remedy="name the column of the text with --text-key" + for_chats(names),
        )
    return key


def _columns(
    names: Sequence[str], key: str, pieces: Callable[[list[str] | None], Iterator[Any]]
) -> Iterator[Any]:
    """The text column in pieces."""
    from pyarrow import compute  # noqa: PLC0415  (an optional extra)

    name, *inner = [key] if key in names else key.split(".")
    for piece in pieces([key]):
        column = piece.column(name)
        yield compute.struct_field(column, inner) if inner else column


def for_chats(keys: Iterable[str]) -> str:
    """What to add to a remedy where these keys are those of conversations."""
    present = set(keys)
    if not any(present.issuperset(one) for one in CHAT_KEYS):
        return ""
    return "; these are conversations, which `apr-dist tokenize encode-chat` encodes"


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
