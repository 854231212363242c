"""APR v1 files of the "APR1" kind: length, JSON, tensor count, JSON index, raw data, CRC32.

Only what is unambiguous is read: a JSON index of named F32, F16 or BF16 tensors under a checksum that
matches. The other v1 kind ("APRN", MessagePack and bincode of one particular model) is refused by
name by the reader.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any, Final, Self

from apr_dist.apr.bounded_json import parse_object
from apr_dist.apr.checksum import crc32
from apr_dist.apr.files import map_readonly
from apr_dist.apr.layout import DAMAGED, FOOTER_BYTES, DType, TensorEntry, payload_bytes
from apr_dist.apr.metadata import AprMetadata
from apr_dist.errors import DamagedModelFile, NotAModelFile, UnsupportedModelFile

MAGIC: Final = b"APR1"
_TYPES = {"F32": DType.F32, "f32": DType.F32, "F16": DType.F16, "f16": DType.F16, "BF16": DType.BF16}


class Apr1File:
    """A mapped APR1 file, checked whole; use it in a ``with`` block.

    Attributes:
        metadata: its JSON, aliases promoted.
        tensors: entries by name; offsets count from the data's first byte.

    Raises:
        ModelFileMissing: no regular, readable file there.
        NotAModelFile: the magic is another one.
        DamagedModelFile: truncated or altered.
        UnsupportedModelFile: an index or element type that cannot be read without guessing.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._data = map_readonly(self.path)
        if bytes(self._data[:4]) != MAGIC:
            raise NotAModelFile(
                "this is no APR1 file", where=self.path, expected=f"a file that begins with {MAGIC!r}"
            )
        self._check_sum()
        try:
            (length,) = struct.unpack_from("<I", self._data, 4)
            count, index_length = struct.unpack_from("<II", self._data, 8 + length)
        except struct.error as error:
            raise self._damaged("it ends inside its metadata") from error
        start = 16 + length
        self.metadata = AprMetadata.parse(bytes(self._data[8 : 8 + length]), where=self.path)
        self._base = start + index_length
        if self._base > len(self._data) - FOOTER_BYTES:
            raise self._damaged("it ends inside its tensor index")
        self.tensors = self._read_index(bytes(self._data[start : self._base]), count)

    def _check_sum(self) -> None:
        stored = int.from_bytes(self._data[-FOOTER_BYTES:], "little")
        if len(self._data) < 20 or crc32(self._data[:-FOOTER_BYTES]) != stored:
            raise self._damaged("its checksum does not match its bytes")

    def _read_index(self, raw: bytes, count: int) -> dict[str, TensorEntry]:
        try:
            listed = parse_object(b'{"index":' + raw + b"}")["index"]
            entries = [self._entry(item) for item in listed]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnsupportedModelFile(
                f"the tensor index of this APR1 file cannot be read without guessing ({error!r})"[:300],
                where=self.path,
                expected="a JSON list of name, dtype, shape, offset and size",
                remedy="convert it to APR v2 with the tool that wrote it",
            ) from error
        found = {entry.name: entry for entry in entries}
        if len(found) != count or len(entries) != count:
            raise self._damaged(f"it announces {count} tensors and lists {len(found)}")
        return found

    def _entry(self, item: Any) -> TensorEntry:
        shape = tuple(item["shape"])
        numbers = (*shape, item["offset"], item["size"])
        if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
            raise ValueError(f"numbers out of range: {json.dumps(numbers)[:80]}")
        entry = TensorEntry(str(item["name"]), _TYPES[item["dtype"]], shape, item["offset"], item["size"])
        if entry.size_bytes != payload_bytes(entry.dtype, shape) or math.prod(shape) >= 1 << 48:
            raise self._damaged(f"tensor {entry.name!r} has {entry.size_bytes} bytes for {list(shape)}")
        if self._base + entry.offset + entry.size_bytes > len(self._data) - FOOTER_BYTES:
            raise self._damaged(f"tensor {entry.name!r} lies outside the file")
        return entry

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._data = memoryview(b"")

    def raw(self, name: str) -> memoryview:
        """The payload of a tensor, not copied."""
        entry = self.tensors[name]
        start = self._base + entry.offset
        return self._data[start : start + entry.size_bytes]

    def _damaged(self, what: str) -> DamagedModelFile:
        return DamagedModelFile(
            f"this APR1 file is damaged: {what}",
            where=self.path,
            expected="a file as its writer left it",
            remedy="copy or download it again",
            falsifier=DAMAGED,
        )
