"""Parts of pages that are generated and stored, so that the page can be read in the checkout as well.

They stand between ``<!-- stored: NAME -->`` and ``<!-- end -->``. ``python docs/_ext/stored_parts.py``
writes them again; a test holds what is stored to what the code says.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(DOCS.parent))

from apr_dist.apr import bounded_json, layout  # noqa: E402  (the checkout's own, found by the line above)
from apr_dist.apr.layout import BLOCKS, ELEMENT_BYTES, WRITABLE, DType, Flag  # noqa: E402
from apr_dist.apr.metadata import ALIASES, KEYS  # noqa: E402
from apr_dist.apr.structure import REFUSED_FLAGS  # noqa: E402
from apr_dist.errors import ExitCode, ModelFileError  # noqa: E402

_PART = re.compile(
    r"(?<=^<!-- stored: )([\w-]+)( -->\n\n)(?:.*?)(?=\n\n<!-- end -->$)", re.MULTILINE | re.DOTALL
)

_READ_FLAGS = {
    Flag.SHARDED: "one shard of a model: read by itself, joined with its siblings by `apr-dist import`, never"
    " exported alone",
    Flag.QUANTIZED: "read: tensors are dequantised when they are used",
    Flag.HAS_VOCAB: f"the tokenizer is inside; set whenever `{layout.VOCABULARY}` is in the metadata",
    Flag.ROW_MAJOR: "always written; absent means row-major too",
}


def header() -> str:
    """A row for each field of the header."""
    rows, offset = [], 0
    for code, meaning in layout.HEADER_FIELDS:
        size = struct.calcsize("<" + code)
        rows.append((offset, size, meaning))
        offset += size
    return _table(("offset", "bytes", "field"), rows)


def flags() -> str:
    """A row for each header flag."""
    rows = [(f"{flag.value:#06x}", flag.name, _flag(flag)) for flag in Flag]
    return _table(("flag", "name", "when read"), [*rows, ("others", "", "refused: nobody defined them")])


def _flag(flag: Flag) -> str:
    return f"refused: {REFUSED_FLAGS[flag]}" if flag in REFUSED_FLAGS else _READ_FLAGS.get(flag, "ignored")


def element_types() -> str:
    """A row for each element type."""
    old = {dtype: code for code, dtype in layout.LEGACY_DTYPE_CODES.items()}
    rows = []
    for dtype in DType:
        code = f"{dtype.value}, in old files {old[dtype]}" if dtype in old else f"{dtype.value}"
        rows.append((code, dtype.name, _size(dtype), "yes" if dtype in WRITABLE else "no"))
    return _table(("code", "type", "size", "in new files"), rows)


def _size(dtype: DType) -> str:
    if dtype in ELEMENT_BYTES:
        size = ELEMENT_BYTES[dtype]
        return f"{size} byte{'s'[: size > 1]} a value"
    if dtype in BLOCKS:
        values, size = BLOCKS[dtype]
        return f"{size} bytes for {values} values"
    return f"{layout.payload_bytes(dtype, (1,)) - 1} bytes of scale, then 1 byte a value"


def metadata_keys() -> str:
    """Every typed key in written order."""
    names = {str: "text", int: "integer", float: "number", dict: "object"}
    rows = []
    for key, kind in KEYS.items():
        others = ", ".join(f"`{other}`" for other in ALIASES.get(key, ()))
        rows.append((f"`{key}`", names.get(kind, "object"), others))
    return _table(("key", "holds", "also read as"), rows)


def limits() -> str:
    """What a file may hold at most."""
    rows = [
        ("metadata", f"{layout.MAX_METADATA_BYTES >> 20} MiB"),
        ("nesting of the metadata", f"{bounded_json.MAX_DEPTH}"),
        ("lists and objects in it", f"{bounded_json.MAX_CONTAINERS:,}"),
        ("keys in it", f"{bounded_json.MAX_KEYS:,}"),
        ("values in it", f"{bounded_json.MAX_VALUES:,}"),
        ("tensors", f"{layout.MAX_TENSORS:,}"),
        ("name of a tensor", f"{layout.MAX_NAME_BYTES} bytes"),
        ("dimensions of a tensor", f"{layout.MAX_DIMS}"),
    ]
    return _table(("what", "at most"), rows)


def file_errors() -> str:
    """A row for each class of refusal of a model file."""
    rows = [(f"`{kind.__name__}`", _lowered(kind.__doc__ or "")) for kind in ModelFileError.__subclasses__()]
    return _table(("class", "when"), rows)


def exit_codes() -> str:
    """A row for each exit code."""
    return _table(("code", "name", "meaning"), [(code.value, code.name, code.meaning) for code in ExitCode])


def _table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines).replace(
        "|  |", "| |"
    )


def _lowered(text: str) -> str:
    return text[0].lower() + text[1:].removesuffix(".")


STORED: Mapping[str, Callable[[], str]] = {
    "header": header,
    "flags": flags,
    "element-types": element_types,
    "metadata-keys": metadata_keys,
    "limits": limits,
    "file-errors": file_errors,
    "exit-codes": exit_codes,
}
"""Name in a page to what generates it."""


def refreshed(page: str) -> str:
    """The text of a page with every stored part as the code has it today.

    Raises:
        KeyError: the page names a part that nothing generates.
    """
    return _PART.sub(lambda match: match.group(1) + match.group(2) + STORED[match.group(1)](), page)


def names_in(page: str) -> list[str]:
    """The stored parts of a page."""
    return [match.group(1) for match in _PART.finditer(page)]


if __name__ == "__main__":
    for path in sorted(DOCS.rglob("*.md")):
        before = path.read_text(encoding="utf-8")
        if refreshed(before) != before:
            path.write_text(refreshed(before), encoding="utf-8")
            print(path.relative_to(DOCS))
