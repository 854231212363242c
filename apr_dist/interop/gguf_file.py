"""A GGUF file, mapped and checked: its fields, its tensors, and their values row by row.

The container is parsed here rather than by the ``gguf`` package because the file may come from anyone
(every count is held against what is there) and because that package builds several arrays for each of
a tokenizer's 100,000 strings, which costs more than all the weights. Types and dequantisation are the
package's. What the names mean is ``gguf_names``' business.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from apr_dist.apr.files import forget, map_readonly
from apr_dist.errors import DamagedModelFile, NotAModelFile, UnsupportedModelFile, UsageError

MAGIC: Final = b"GGUF"
_VERSIONS = (2, 3)
_MAX_FIELDS = 1 << 16
_MAX_TENSORS = 1 << 18
_MAX_ARRAY = 1 << 22
_MAX_DIMS = 4
_MAX_ELEMENTS = 1 << 48
_STRING, _ARRAY = 8, 9
_SCALARS = dict(
    zip(
        (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12),
        ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "<u8", "<i8", "<f8"),
        strict=True,
    )
)


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: GGUF name, such as ``blk.0.attn_q.weight``.
        type_name: the GGML type's name, such as ``Q4_1``.
        shape: row-major, outermost first.
        start: first byte of its data in the file.
        row_bytes: bytes of one packed row (the last dimension).
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    start: int
    row_bytes: int

    @property
    def rows(self) -> int:
        """Number of rows: the product of all dimensions but the last."""
        return math.prod(self.shape[:-1])


class GgufFile:
    """A mapped GGUF file of version 2 or 3, little-endian; use it in a ``with`` block.

    Attributes:
        fields: key-value pairs; arrays of numbers are numpy arrays, arrays of strings lists.
        tensors: by name, in file order.

    Raises:
        ModelFileMissing: no regular, readable file there.
        NotAModelFile: empty or another format.
        UnsupportedModelFile: another version, byte order, or a type the ``gguf`` package lacks.
        DamagedModelFile: truncated or inconsistent.
        UsageError: the ``gguf`` package is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._gguf = load_gguf_package()
        self._map = map_readonly(self.path)
        try:
            cursor = _Cursor(self._map, self.path)
            count, field_count = _counts(cursor, self.path)
            self.fields: dict[str, Any] = {}
            for _ in range(field_count):
                key = cursor.string()
                self.fields[key] = cursor.value(cursor.u32())
            self.tensors = self._read_tensors(cursor, count)
        except (IndexError, ValueError, struct.error) as error:  # the cursor ran off the end, or not UTF-8
            raise self._damaged(f"its header cannot be read ({error})") from error

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._map = memoryview(b"")

    def _read_tensors(self, cursor: _Cursor, count: int) -> dict[str, GgufTensor]:
        found = []
        for _ in range(count):
            name, dims = cursor.string(), cursor.u32()
            if dims > _MAX_DIMS:
                raise self._damaged(f"tensor {name!r} has {dims} dimensions")
            shape = tuple(reversed([cursor.u64() for _ in range(dims)])) or (1,)
            found.append((name, shape, cursor.u32(), cursor.u64()))
        alignment = int(self.fields.get("general.alignment", 32))
        if not 0 < alignment <= 1 << 16:
            raise self._damaged(f"its alignment is {alignment}")
        base = -(-cursor.position // alignment) * alignment
        tensors = [self._tensor(name, shape, code, base + offset) for name, shape, code, offset in found]
        if len({tensor.name for tensor in tensors}) != count:
            raise self._damaged("a tensor name is repeated")
        return {tensor.name: tensor for tensor in tensors}

    def _tensor(self, name: str, shape: tuple[int, ...], code: int, start: int) -> GgufTensor:
        try:
            kind = self._gguf.GGMLQuantizationType(code)
            values, size = self._gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise UnsupportedModelFile(
                f"tensor {name!r} has GGML type {code}",
                where=self.path,
                expected="a type the installed gguf package knows",
                remedy="upgrade the gguf package",
            ) from None
        row_bytes = shape[-1] // values * size
        end = start + math.prod(shape[:-1]) * row_bytes
        if math.prod(max(1, dim) for dim in shape) > _MAX_ELEMENTS or shape[-1] % values:
            raise self._damaged(f"tensor {name!r} ({kind.name}) has the shape {list(shape)}")
        if end > len(self._map):
            raise self._damaged(
                f"tensor {name!r} ends at byte {end} of a file of {len(self._map)}: truncated"
            )
        return GgufTensor(name, kind.name, shape, start, row_bytes)

    def packed_rows(self, tensor: GgufTensor, first: int, last: int) -> memoryview:
        """The bytes of rows ``first`` to ``last`` (excluded) as they lie in the file."""
        return self._map[tensor.start + first * tensor.row_bytes : tensor.start + last * tensor.row_bytes]

    def float32_rows(self, tensor: GgufTensor, first: int, last: int) -> npt.NDArray[np.float32]:
        """Rows ``first`` to ``last`` (excluded) dequantised, ``[rows, columns]``.

        Raises:
            UnsupportedModelFile: the ``gguf`` package cannot dequantise this type.
        """
        kind = self._gguf.GGMLQuantizationType[tensor.type_name]
        packed = np.frombuffer(self.packed_rows(tensor, first, last), np.uint8)
        try:
            with np.errstate(all="ignore"):
                values = self._gguf.dequantize(packed.reshape(1, -1), kind)  # one long row: one pass
        except NotImplementedError:
            raise UnsupportedModelFile(
                f"tensor {tensor.name!r} has type {tensor.type_name}",
                where=self.path,
                expected="a type the installed gguf package can dequantise",
                remedy="take the model in another quantisation, or upgrade the gguf package",
            ) from None
        return np.asarray(values, np.float32).reshape(last - first, tensor.shape[-1])

    def forget(self, tensor: GgufTensor) -> None:
        """Let the system take back the memory that reading this tensor filled (it may be read again)."""
        forget(self.packed_rows(tensor, 0, tensor.rows))

    def _damaged(self, what: str) -> DamagedModelFile:
        return DamagedModelFile(
            f"this GGUF file is damaged: {what}",
            where=self.path,
            expected="a complete GGUF file",
            remedy="copy or download it again",
        )


class _Cursor:
    """Reads one value after the other; beyond the end it raises ``struct.error`` or ``IndexError``."""

    def __init__(self, data: memoryview, path: Path) -> None:
        self._data, self._path, self.position = data, path, 0

    def u32(self) -> int:
        return int(self._scalar("<I", 4))

    def u64(self) -> int:
        return int(self._scalar("<Q", 8))

    def _scalar(self, form: str, size: int) -> int:
        (value,) = struct.unpack_from(form, self._data, self.position)
        self.position += size
        return int(value)

    def take(self, size: int) -> memoryview:
        if size > len(self._data) - self.position:
            raise IndexError(f"{size} bytes claimed at byte {self.position} of {len(self._data)}")
        piece = self._data[self.position : self.position + size]
        self.position += size
        return piece

    def string(self) -> str:
        return str(self.take(self.u64()), "utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(self.u32(), self.u64())
        return self._numbers(kind, 1)[0].item()

    def _array(self, kind: int, count: int) -> Any:
        if count > _MAX_ARRAY:
            raise IndexError(f"an array of {count} values")
        if kind == _STRING:
            return self._strings(count)
        return self._numbers(kind, count)

    def _strings(self, count: int) -> list[str]:
        """As ``string``, in one loop without calls: a vocabulary has a hundred thousand of them."""
        data, position, limit = self._data, self.position, len(self._data)
        length_at = struct.Struct("<Q").unpack_from
        found: list[str] = []
        for _ in range(count):
            start = position + 8
            position = start + length_at(data, position)[0]
            if position > limit:
                raise IndexError(f"a string ends at byte {position} of {limit}")
            found.append(str(data[start:position], "utf-8"))
        self.position = position
        return found

    def _numbers(self, kind: int, count: int) -> npt.NDArray[Any]:
        if kind not in _SCALARS:
            raise ValueError(f"a field of type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)


def _counts(cursor: _Cursor, path: Path) -> tuple[int, int]:
    magic = bytes(cursor.take(min(4, len(cursor._data))))
    if magic != MAGIC:
        raise NotAModelFile(
            f"the file begins with {magic!r}" if magic else "the file is empty",
            where=path,
            expected=f"a GGUF file, which begins with {MAGIC!r}",
            remedy="check the path",
        )
    version = cursor.u32()
    if version not in _VERSIONS:
        order = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
        raise UnsupportedModelFile(
            f"the GGUF file is {order}", where=path, expected="little-endian, version 2 or 3"
        )
    tensors, fields = cursor.u64(), cursor.u64()
    if tensors > _MAX_TENSORS or fields > _MAX_FIELDS:
        raise UnsupportedModelFile(
            f"the GGUF file claims {tensors} tensors and {fields} fields",
            where=path,
            expected=f"at most {_MAX_TENSORS} and {_MAX_FIELDS}",
        )
    return tensors, fields


def load_gguf_package() -> Any:
    """The ``gguf`` package, imported on first use.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import gguf  # noqa: PLC0415 - optional, and needed by this format only
    except ImportError as error:
        raise UsageError(
            "GGUF files need the gguf package, which is not installed",
            remedy='pip install "apr-dist[gguf]"',
        ) from error
    return gguf
