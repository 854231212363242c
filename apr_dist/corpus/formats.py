"""How bytes become documents: JSON lines, JSON arrays, plain text, Parquet and Arrow, plain or compressed.

Lives here: recognising a format by its content, and one reader a format, in bounded memory, yielding a record
for everything it meets, also for what is no document (so that nothing is skipped in silence). Which files are
read lives in ``sources``.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, TypeAlias, cast

from apr_dist.errors import CorpusError
from apr_dist.parsing import parse_json, printable

STDIN = Path("-")
TEXT_KEYS = ("content", "text")
"""Keys looked for when none is named, in this order."""

# A document is tokenized and split as one; this bounds the memory that one can take.
MAX_DOCUMENT_BYTES = 16 * 2**20
# A JSON array cannot be read in parts.
MAX_ARRAY_BYTES = 256 * 2**20
_START_BYTES = 1 << 16
_MISSING = object()


class Kind(Enum):
    """What a file's bytes are, after decompression."""

    JSONL = "jsonl"
    JSON = "json"
    TEXT = "text"
    PARQUET = "parquet"
    ARROW = "arrow"


class Packing(Enum):
    """How a file is compressed."""

    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"
    XZ = "xz"
    BZIP2 = "bzip2"


_MAGIC = {
    b"\x1f\x8b": Packing.GZIP,
    b"\x28\xb5\x2f\xfd": Packing.ZSTD,
    b"\xfd7zXZ\0": Packing.XZ,
    b"BZh": Packing.BZIP2,
}
_PACKED = {".gz": Packing.GZIP, ".zst": Packing.ZSTD, ".xz": Packing.XZ, ".bz2": Packing.BZIP2}
_NAMED = {
    ".jsonl": Kind.JSONL,
    ".ndjson": Kind.JSONL,
    ".json": Kind.JSON,
    ".txt": Kind.TEXT,
    ".parquet": Kind.PARQUET,
    ".arrow": Kind.ARROW,
    ".feather": Kind.ARROW,
}
# Text to the eye, but records to their maker.
_TABLES = frozenset({".csv", ".tsv", ".psv"})


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


def is_corpus_name(path: Path) -> bool:
    """Whether the name says that the file can only be meant as a corpus."""
    return _stem_suffix(path) in _NAMED


def recognise(path: Path) -> tuple[Kind, Packing]:
    """What a file is, by its first bytes; its name only decides between what the bytes allow.

    Raises:
        CorpusError: it cannot be read, its name and its content contradict each other, or it is of no
            format that is read.
    """
    with _reading(path), path.open("rb") as file:
        magic = file.read(8)
    packing = next((one for mark, one in _MAGIC.items() if magic.startswith(mark)), Packing.NONE)
    named = _PACKED.get(path.suffix.lower())
    if magic and named not in (None, packing):
        raise CorpusError(
            f"its compressed stream is damaged (it does not begin as {path.suffix} files do)", where=path
        )
    with _opened(path, packing, None) as file:
        start = file.read(_START_BYTES)
    return _kind_of(start, _stem_suffix(path), path), packing


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
    with _opened(path, packing, on_open) as file:
        if kind is Kind.TEXT:
            yield from islice(_text(path, file), skip, None)
        elif kind is Kind.JSON:
            yield from islice(_array(path, file, text_keys), skip, None)
        else:
            yield from _jsonl(path, file, text_keys, skip)


def _stem_suffix(path: Path) -> str:
    """The suffix before that of a compression, in lower case."""
    inner = path.with_suffix("") if path.suffix.lower() in _PACKED else path
    return inner.suffix.lower()


def _kind_of(start: bytes, suffix: str, path: Path) -> Kind:
    if start.startswith(b"PAR1"):
        return Kind.PARQUET
    if start.startswith(b"ARROW1") or (start.startswith(b"\xff\xff\xff\xff") and suffix == ".arrow"):
        return Kind.ARROW
    named = _NAMED.get(suffix)
    if named in (Kind.JSONL, Kind.PARQUET, Kind.ARROW):
        return named
    if b"\0" in start or suffix in _TABLES:
        what = f"a {suffix} table" if suffix in _TABLES else "binary, and of no format that is known"
        raise CorpusError(
            f"it is {what}",
            where=path,
            expected="JSON lines, a JSON array, plain text, Parquet or Arrow",
            remedy="convert it to JSON lines, one object with the text a line",
        )
    begin = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if named is Kind.JSON and not begin.startswith(b"{"):
        return Kind.JSON
    if named is Kind.JSON:
        return _lines_of_json(start, path)
    if _is_json_object(begin.partition(b"\n")[0]):
        raise CorpusError(
            "its content is JSON lines and its name says plain text",
            where=path,
            remedy="rename it to .jsonl",
        )
    return Kind.TEXT


def _lines_of_json(start: bytes, path: Path) -> Kind:
    """A ``.json`` file that begins with an object: one object a line, or refused."""
    line, newline, _ = start.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    if newline and not _is_json_object(line):
        raise CorpusError(
            "it is one JSON object over several lines",
            where=path,
            expected="one object a line, or an array of objects",
            remedy="convert it to JSON lines, one object with the text a line",
        )
    return Kind.JSONL


def _is_json_object(line: bytes) -> bool:
    if not line.startswith(b"{"):
        return False
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Damage and refusals met while reading ``path`` become a ``CorpusError``."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise CorpusError(f"its compressed stream is damaged ({error})", where=path) from error
    except OSError as error:
        what = f"it cannot be read ({error.strerror})" if error.strerror else f"it is damaged ({error})"
        raise CorpusError(what, where=path) from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # its class is known only once its optional package is there
            raise
        raise CorpusError(f"its compressed stream is damaged ({error})", where=path) from error


@contextmanager
def _opened(path: Path, packing: Packing, on_open: Callable[[BinaryIO], None] | None) -> Iterator[BinaryIO]:
    """The decompressed bytes of ``path``."""
    if path == STDIN:
        yield sys.stdin.buffer
        return
    with _reading(path), ExitStack() as stack:
        packed = stack.enter_context(path.open("rb"))
        if on_open is not None:
            on_open(packed)
        yield stack.enter_context(_unpacked(packed, packing)) if packing is not Packing.NONE else packed


def _unpacked(packed: BinaryIO, packing: Packing) -> BinaryIO:
    if packing is Packing.GZIP:
        return cast(BinaryIO, gzip.open(packed, "rb"))
    if packing is Packing.XZ:
        return cast(BinaryIO, lzma.open(packed, "rb"))
    if packing is Packing.BZIP2:
        return cast(BinaryIO, bz2.open(packed, "rb"))
    return cast(BinaryIO, _zstd().open(packed, "rb"))


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
