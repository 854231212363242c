"""What a file of a corpus is, by its first bytes, and its bytes without their compression.

Lives here: formats and compressions by content and name, and opening. How a format's bytes become documents
lives in ``formats``.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, cast

from apr_dist.errors import CorpusError
from apr_dist.parsing import parse_json

STDIN = Path("-")
_START_BYTES = 1 << 16


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
    with opened(path, packing, None) as file:
        start = file.read(_START_BYTES)
    return _kind_of(start, _stem_suffix(path), path), packing


@contextmanager
def opened(path: Path, packing: Packing, on_open: Callable[[BinaryIO], None] | None) -> Iterator[BinaryIO]:
    """The decompressed bytes of ``path``."""
    if path == STDIN:
        yield sys.stdin.buffer
        return
    with _reading(path), ExitStack() as stack:
        packed = stack.enter_context(path.open("rb"))
        if on_open is not None:
            on_open(packed)
        yield stack.enter_context(_unpacked(packed, packing)) if packing is not Packing.NONE else packed


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
