"""Opening an APR v2 file: mapped read-only, checked completely, tensors handed out without a copy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt
import xxhash

from apr_dist.apr.checksum import crc32
from apr_dist.apr.files import forget, map_readonly, passing
from apr_dist.apr.layout import (
    DAMAGED,
    ELEMENT_BYTES,
    FOOTER_BYTES,
    HEADER_BYTES,
    DType,
    Header,
    TensorEntry,
    unpack_index,
)
from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.quantized import dequantize
from apr_dist.apr.structure import check_extents, check_header, check_magic, without_placeholder
from apr_dist.errors import DamagedModelFile, UnsupportedModelFile

NUMPY_TYPES: Final[Mapping[DType, np.dtype[Any]]] = {
    DType.F32: np.dtype("<f4"),
    DType.F16: np.dtype("<f2"),
    DType.F64: np.dtype("<f8"),
    DType.I32: np.dtype("<i4"),
    DType.I64: np.dtype("<i8"),
    DType.I8: np.dtype("i1"),
    DType.U8: np.dtype("u1"),
    DType.BF16: np.dtype("<u2"),
}
"""The numpy type of every unquantised dtype; BF16, which numpy lacks, as its 16 bits."""

Verify = Literal["full", "structure"]


class AprReader:
    """A mapped APR v2 file; use it in a ``with`` block.

    Args:
        path: the file.
        verify: ``"full"`` also compares the footer's CRC32 with every byte before it (one pass over
            the file); ``"structure"`` leaves that one pass out.
        progress: called with (bytes summed, bytes in all) while the checksum of the file is computed.
        footer_required: off accepts a file that ends exactly where its footer would begin, as one
            old converter leaves them; such a file's tensor data cannot be verified.

    Attributes:
        path: as given.
        size_bytes: length of the file.
        header: its first 64 bytes, parsed.
        metadata: typed and custom keys.
        tensors: entries by name, in index order (sorted by name); a placeholder of a tied head is left out.
        has_footer: whether the file carries its own checksum.

    Views handed out stay valid after the reader is closed; the map goes with the last of them.

    Raises:
        ModelFileMissing: no regular, readable file at ``path``.
        NotAModelFile: empty, or another format.
        UnsupportedModelFile: an older version, or a flag, dtype or size that is not read.
        DamagedModelFile: truncated, altered, or inconsistent with itself.
    """

    def __init__(
        self,
        path: Path,
        *,
        verify: Verify = "full",
        footer_required: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.path, self._progress = Path(path), progress
        self._data = map_readonly(self.path)
        self.size_bytes = len(self._data)
        self._digest: str | None = None
        check_magic(bytes(self._data[:HEADER_BYTES]), where=self.path)
        self.header = Header.unpack(bytes(self._data[:HEADER_BYTES]), where=self.path)
        try:
            self._read_structure(footer_required)
        except UnsupportedModelFile:
            if verify == "full":  # an altered byte can look like an unknown feature: say which it is
                self._check_footer()
            raise
        if verify == "full" and self.has_footer:
            self._check_footer()

    def _read_structure(self, footer_required: bool) -> None:
        header = self.header
        check_header(header, self.size_bytes, where=self.path)
        metadata = self._data[header.metadata_offset : header.metadata_offset + header.metadata_size]
        self.metadata = AprMetadata.parse(bytes(metadata), where=self.path)
        index = self._data[header.index_offset : header.data_offset]
        entries = without_placeholder(unpack_index(index, header.tensor_count, where=self.path))
        self.has_footer = check_extents(
            header, entries, self.size_bytes, where=self.path, footer_required=footer_required
        )
        self.tensors: dict[str, TensorEntry] = {entry.name: entry for entry in entries}

    def footer_matches(self) -> bool:
        """Whether the footer's CRC32 is that of every byte before it; reads the whole file."""
        stored, computed = self._footer_sums()
        return stored == computed

    def _footer_sums(self) -> tuple[int, int]:
        computed = crc32(  # never more than a few pieces in memory
            self._data[:-FOOTER_BYTES], done=forget, progress=self._progress
        )
        return int.from_bytes(self._data[-FOOTER_BYTES:], "little"), computed

    def _check_footer(self) -> None:
        stored, computed = self._footer_sums()
        if stored != computed:
            raise DamagedModelFile(
                f"the footer's checksum is {stored:#010x} but the file's bytes give {computed:#010x}",
                where=self.path,
                expected="a file as its writer left it",
                remedy="copy or download the file again; it was altered or cut",
                falsifier=DAMAGED,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the map; views that were handed out keep it alive until they are gone."""
        self._data = memoryview(b"")

    def raw(self, name: str) -> memoryview:
        """The payload of a tensor as it lies in the file: read-only, not copied, without padding."""
        entry = self.tensors[name]
        start = self.header.data_offset + entry.offset
        return self._data[start : start + entry.size_bytes]

    def array(self, name: str) -> npt.NDArray[Any]:
        """A read-only numpy view in the tensor's own dtype and shape (BF16 as uint16).

        Raises:
            UnsupportedModelFile: the tensor is quantised, so it has no plain elements.
        """
        entry = self.tensors[name]
        if entry.dtype not in ELEMENT_BYTES:
            raise UnsupportedModelFile(
                f"tensor {name!r} is quantised ({entry.dtype.name})",
                where=self.path,
                expected="plain elements",
                remedy="read it dequantised, as float32",
            )
        values: npt.NDArray[Any] = np.frombuffer(self.raw(name), NUMPY_TYPES[entry.dtype])
        return values.reshape(entry.shape)

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor's values as float32 in its shape; F32 is a read-only view, all else a copy."""
        entry = self.tensors[name]
        if entry.dtype not in ELEMENT_BYTES:
            return dequantize(entry, np.frombuffer(self.raw(name), np.uint8))
        values = self.array(name)
        if entry.dtype is DType.BF16:
            return widen_bfloat16(values)
        with np.errstate(over="ignore"):
            return values.astype(np.float32, copy=False)

    def forget(self, name: str) -> None:
        """Let the system take back the memory that reading this tensor filled; it can be read again."""
        forget(self.raw(name))

    def digest(self, progress: Callable[[int, int], None] | None = None) -> str:
        """``sha256:`` and the hex digest of the whole file; computed once, on first use.

        ``progress`` is called with (bytes hashed, bytes in all).
        """
        if self._digest is None:
            hashed, count = hashlib.sha256(), 0
            for piece in passing(self._data):
                hashed.update(piece)
                count += len(piece)
                if progress is not None:
                    progress(count, self.size_bytes)
            self._digest = f"sha256:{hashed.hexdigest()}"
        return self._digest

    def tensor_digest(self, name: str) -> str:
        """xxh3_128 hex digest of a tensor's payload bytes."""
        return xxhash.xxh3_128(self.raw(name)).hexdigest()


def widen_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """BF16 bit patterns to the float32 values they stand for, exactly."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)
