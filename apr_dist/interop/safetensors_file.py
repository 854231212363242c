"""Safetensors files, read and written tensor by tensor.

The ``safetensors`` package has no reader that leaves BF16 alone without torch, and no writer that
takes tensors one at a time; the container is eight bytes of length, a JSON header and the data, so it
is handled here, with every number of the header checked against the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from apr_dist.apr.bounded_json import parse_object
from apr_dist.apr.files import forget, map_readonly
from apr_dist.apr.layout import DType
from apr_dist.apr.writer import TensorSpec
from apr_dist.atomic_files import AtomicFile
from apr_dist.errors import DamagedModelFile, NotAModelFile, UnsupportedModelFile

_MAX_HEADER = 100_000_000  # the limit of the safetensors package
_MAX_ELEMENTS = 1 << 48
_TYPES: Final[Mapping[str, DType]] = {
    "F32": DType.F32,
    "F16": DType.F16,
    "BF16": DType.BF16,
    "F64": DType.F64,
}
_ELEMENT_BYTES = {DType.F32: 4, DType.F16: 2, DType.BF16: 2, DType.F64: 8}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file: where its bytes are, and what they mean."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    start: int
    size_bytes: int


class SafetensorsFile:
    """A mapped safetensors file; use it in a ``with`` block.

    Attributes:
        tensors: by name, in file order.
        said: what its maker wrote beside them, text by key.

    Raises:
        ModelFileMissing: no regular, readable file there.
        NotAModelFile: too short, or no JSON header follows the length.
        DamagedModelFile: truncated, or the header contradicts the file.
        UnsupportedModelFile: a tensor of a type no APR file should hold, named.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._map = map_readonly(self.path)
        length = int.from_bytes(self._map[:8], "little")
        if len(self._map) < 8 or bytes(self._map[8:9]) != b"{":
            raise NotAModelFile(
                "the file is empty" if not len(self._map) else "the file is no safetensors file",
                where=self.path,
                expected="a length and a JSON header",
                remedy="check the path",
            )
        if length > min(_MAX_HEADER, len(self._map) - 8):
            raise self._damaged(f"its header is said to take {length} bytes of {len(self._map)}")
        try:
            header = parse_object(bytes(self._map[8 : 8 + length]))
        except ValueError as error:
            raise self._damaged(f"its header cannot be read: {error}") from error
        said = header.pop("__metadata__", None)
        self.said = {key: str(value) for key, value in said.items()} if isinstance(said, dict) else {}
        entries = (self._tensor(name, facts, 8 + length) for name, facts in header.items())
        self.tensors = {entry.name: entry for entry in sorted(entries, key=lambda entry: entry.start)}

    def _tensor(self, name: str, facts: Any, base: int) -> StoredTensor:
        try:
            kind, shape, (first, last) = facts["dtype"], tuple(facts["shape"]), facts["data_offsets"]
            numbers = (*shape, first, last)
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"the header's entry for {name[:60]!r} is malformed") from error
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise self._damaged(f"the header's entry for {name[:60]!r} holds {numbers!r}"[:200])
        if kind not in _TYPES:
            raise UnsupportedModelFile(
                f"tensor {name!r} has type {kind!r}",
                where=self.path,
                expected="one of " + ", ".join(_TYPES),
                remedy="remove it or convert it before importing",
            )
        dtype = _TYPES[kind]
        too_large = math.prod(max(1, size) for size in shape) > _MAX_ELEMENTS
        if too_large or last - first != math.prod(shape) * _ELEMENT_BYTES[dtype]:
            raise self._damaged(f"tensor {name!r} ({kind}, {list(shape)}) has {last - first} bytes")
        if base + last > len(self._map):
            raise self._damaged(f"tensor {name!r} ends at byte {base + last} of {len(self._map)}: truncated")
        return StoredTensor(name, dtype, shape, base + first, last - first)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._map = memoryview(b"")

    def pieces(self, tensor: StoredTensor, piece_bytes: int) -> Iterator[memoryview]:
        """The tensor's bytes in order, at most ``piece_bytes`` each; memory is given back behind them."""
        end = tensor.start + tensor.size_bytes
        for first in range(tensor.start, end, piece_bytes):
            yield self._map[first : min(end, first + piece_bytes)]
        forget(self._map[tensor.start : end])

    def _damaged(self, what: str) -> DamagedModelFile:
        return DamagedModelFile(
            f"this safetensors file is damaged: {what}",
            where=self.path,
            expected="a complete safetensors file",
            remedy="copy or download it again",
        )


class SafetensorsWriter:
    """A new safetensors file that takes its tensors in the order they were announced, in pieces.

    Args:
        path: the file to make.
        tensors: what it will hold, in order.
        overwrite: whether an existing file may be replaced.
        said: text by key for its header.

    Raises:
        OutputError: the file exists and ``overwrite`` is off, or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[TensorSpec],
        *,
        overwrite: bool = False,
        said: Mapping[str, str] | None = None,
    ) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(said or {})}}
        offset = 0
        for spec in tensors:
            size = math.prod(spec.shape) * _ELEMENT_BYTES[spec.dtype]
            header[spec.name] = {
                "dtype": spec.dtype.name,
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        self._file = AtomicFile(path, overwrite=overwrite)
        self._position = 8 + len(text)
        self._head = len(text).to_bytes(8, "little") + text

    def __enter__(self) -> Self:
        self._file.write_at(0, self._head)
        return self

    def append(self, piece: Any) -> None:
        """Write the next bytes."""
        view = memoryview(piece)
        if view.nbytes:
            self._file.write_at(self._position, view)
        self._position += view.nbytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind)
