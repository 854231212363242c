"""The bytes of an APR v2 file: constants, header, tensor index, and how large a tensor's payload is.

Pure functions and frozen facts; nothing here opens a file. What the fields mean together (bounds,
overlap, checksums) is checked in ``structure``; metadata JSON lives in ``metadata``.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Final

from apr_dist.errors import DamagedModelFile, UnsupportedModelFile

MAGIC: Final = b"APR\0"
VERSION: Final = (2, 0)
HEADER_BYTES: Final = 64
FOOTER_BYTES: Final = 4
ALIGNMENT: Final = 64
MAX_METADATA_BYTES: Final = 16 * 1024 * 1024
MAX_NAME_BYTES: Final = 256
MAX_DIMS: Final = 8
MAX_TENSORS: Final = 1 << 18
"""Our own limit: an index of hostile size must not become gigabytes of Python objects."""

DAMAGED: Final = "FALSIFY-APR-DIST-CHECKPOINT-001"
"""Falsifier of every refusal of a damaged file."""

HEADER_FIELDS: Final = (
    ("4s", "magic: `APR` and a zero byte"),
    ("BB", "version, major and minor: 2, 0"),
    ("H", "flags"),
    ("I", "number of tensors"),
    ("Q", "offset of the metadata, 64 when written"),
    ("I", "size of the metadata, without padding"),
    ("Q", "offset of the tensor index"),
    ("Q", "offset of the tensor data"),
    ("I", "CRC32 of bytes 0-39 and 44-63"),
    ("20s", "reserved: zero when written, kept by the checksum when read"),
)
"""The 64 bytes in order: type as ``struct`` names it (little-endian, no padding), and what it holds."""

_HEADER = struct.Struct("<" + "".join(code for code, _ in HEADER_FIELDS))
_CHECKSUM_OFFSET = 40
_ENTRY_TAIL = struct.Struct("<QQ")
_MIN_ENTRY_BYTES = 20


class Flag(IntFlag):
    """Header flags (u16 at byte 6)."""

    LZ4 = 0x0001
    ZSTD = 0x0002
    ENCRYPTED = 0x0004
    SIGNED = 0x0008
    SHARDED = 0x0010
    QUANTIZED = 0x0020
    FILTERBANK = 0x0040
    MODEL_CARD = 0x0080
    STREAMING = 0x0100
    HAS_VOCAB = 0x0200
    ROW_MAJOR = 0x0400
    COLUMN_MAJOR = 0x0800


class DType(IntEnum):
    """Tensor element types by their code in the index."""

    F32 = 0
    F16 = 1
    F64 = 3
    I32 = 4
    I64 = 5
    I8 = 6
    U8 = 7
    Q4_K = 12
    Q6_K = 14
    BF16 = 30
    APR_Q4 = 128
    APR_Q8 = 129


LEGACY_DTYPE_CODES: Final = {8: DType.APR_Q4, 9: DType.APR_Q8}
"""Codes that old files use for today's 128 and 129; read, never written."""

ELEMENT_BYTES: Final = {
    DType.F32: 4,
    DType.F16: 2,
    DType.F64: 8,
    DType.I32: 4,
    DType.I64: 8,
    DType.I8: 1,
    DType.U8: 1,
    DType.BF16: 2,
}
"""Bytes of one element of every dtype that is not packed in blocks."""

BLOCKS: Final = {DType.APR_Q4: (32, 18), DType.Q4_K: (256, 144), DType.Q6_K: (256, 210)}
"""(values, bytes) of one block of the block-quantised dtypes."""

VOCABULARY: Final = "tokenizer.vocabulary"
"""Custom metadata key whose presence the flag HAS_VOCAB announces."""

HF_CONFIG: Final = "apr_dist.hf_config"
"""Custom key of the configuration that a model was imported with."""

TOKENIZER_TEXT: Final = "tokenizer.json"
"""Custom metadata key that holds the text of the tokenizer's file of the same name."""

WRITABLE: Final = frozenset({DType.F32, DType.F16, DType.BF16})
"""What a new file may hold: the dtypes that every reader understands alike."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One line of the tensor index.

    Attributes:
        name: Hugging Face name, UTF-8.
        dtype: element type.
        shape: row-major, outermost first; empty for a scalar.
        offset: bytes from the start of the data section, a multiple of 64.
        size_bytes: payload without its padding.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    @property
    def num_elements(self) -> int:
        """Product of the dimensions (1 for a scalar)."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """The first 64 bytes; offsets count from the start of the file, sizes are unpadded bytes."""

    flags: Flag
    tensor_count: int
    metadata_size: int
    index_offset: int
    data_offset: int
    metadata_offset: int = HEADER_BYTES
    version: tuple[int, int] = VERSION
    reserved: bytes = bytes(20)

    def pack(self) -> bytes:
        """The 64 bytes with their CRC32 (over bytes 0-39 and 44-63) filled in."""
        raw = self._pack_with(0)
        return self._pack_with(header_crc(raw))

    def _pack_with(self, crc: int) -> bytes:
        return _HEADER.pack(
            MAGIC,
            *self.version,
            self.flags,
            self.tensor_count,
            self.metadata_offset,
            self.metadata_size,
            self.index_offset,
            self.data_offset,
            crc,
            self.reserved,
        )

    @classmethod
    def unpack(cls, raw: bytes, *, where: Path | None = None) -> Header:
        """Parse and check the CRC of 64 header bytes (the magic is the caller's business).

        Raises:
            DamagedModelFile: fewer than 64 bytes, or the header's CRC32 does not match.
        """
        if len(raw) < HEADER_BYTES:
            raise DamagedModelFile(
                f"the file ends inside the header, after {len(raw)} bytes",
                where=where,
                expected=f"a header of {HEADER_BYTES} bytes",
                remedy="copy or download the file again; it is truncated",
                falsifier=DAMAGED,
            )
        fields = _HEADER.unpack(raw[:HEADER_BYTES])
        _, major, minor, flags, count, meta_at, meta_size, index_at, data_at, crc, reserved = fields
        computed = header_crc(raw)
        if crc != computed:
            raise DamagedModelFile(
                f"the header's checksum is {crc:#010x} but its bytes give {computed:#010x}",
                where=where,
                expected="a header as its writer left it",
                remedy="copy or download the file again; it was altered",
                falsifier=DAMAGED,
            )
        return cls(Flag(flags), count, meta_size, index_at, data_at, meta_at, (major, minor), bytes(reserved))


def header_crc(raw: bytes) -> int:
    """CRC32 of header bytes 0-39 and 44-63 (the checksum field itself is left out)."""
    return zlib.crc32(raw[_CHECKSUM_OFFSET + 4 : HEADER_BYTES], zlib.crc32(raw[:_CHECKSUM_OFFSET]))


def align(size: int) -> int:
    """The next multiple of 64 at or above ``size``."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def payload_bytes(dtype: DType, shape: Sequence[int]) -> int:
    """Bytes of a tensor's payload: plain elements, whole blocks, or APR_Q8's scale and values."""
    elements = math.prod(shape)
    if dtype in ELEMENT_BYTES:
        return elements * ELEMENT_BYTES[dtype]
    if dtype is DType.APR_Q8:
        return 4 + elements if elements else 0
    values, size = BLOCKS[dtype]
    return -(-elements // values) * size


def pack_index(entries: Iterable[TensorEntry]) -> bytes:
    """The index as it lies in a file: entries sorted bytewise by name, back to back, not padded."""
    parts: list[bytes] = []
    for entry in sorted(entries, key=lambda entry: entry.name.encode()):
        name = entry.name.encode()
        parts.append(struct.pack("<H", len(name)) + name + bytes((entry.dtype, len(entry.shape))))
        parts.append(struct.pack(f"<{len(entry.shape)}Q", *entry.shape))
        parts.append(_ENTRY_TAIL.pack(entry.offset, entry.size_bytes))
    return b"".join(parts)


def unpack_index(raw: memoryview, count: int, *, where: Path | None = None) -> list[TensorEntry]:
    """Parse ``count`` entries from the bytes between index and data section.

    Raises:
        DamagedModelFile: the entries do not fit, are unsorted or repeated, or a name is unusable.
        UnsupportedModelFile: more entries than ``MAX_TENSORS``, or a dtype code nobody defined.
    """
    if count * _MIN_ENTRY_BYTES > len(raw):
        raise _bad_index(f"{count} tensors are claimed in an index of {len(raw)} bytes", where)
    if count > MAX_TENSORS:
        raise UnsupportedModelFile(
            f"the file holds {count} tensors", where=where, expected=f"at most {MAX_TENSORS}"
        )
    entries: list[TensorEntry] = []
    position, previous = 0, b""
    for ordinal in range(count):
        try:
            entry, name, position = _unpack_entry(raw, position, where)
        except struct.error as error:
            raise _bad_index(f"the index ends inside entry {ordinal} of {count}", where) from error
        if ordinal and name <= previous:
            kind = "twice" if name == previous else "out of order"
            raise _bad_index(f"the index lists {entry.name!r} {kind}", where)
        entries.append(entry)
        previous = name
    return entries


def _unpack_entry(raw: memoryview, start: int, where: Path | None) -> tuple[TensorEntry, bytes, int]:
    (length,) = struct.unpack_from("<H", raw, start)
    if length > MAX_NAME_BYTES:
        raise _bad_index(f"a tensor name of {length} bytes (the limit is {MAX_NAME_BYTES})", where)
    (name,) = struct.unpack_from(f"{length}s", raw, start + 2)
    code, ndim = struct.unpack_from("<BB", raw, start + 2 + length)
    if ndim > MAX_DIMS:
        raise _bad_index(f"tensor {_shown(name)} has {ndim} dimensions (the limit is {MAX_DIMS})", where)
    position = start + 4 + length
    shape = struct.unpack_from(f"<{ndim}Q", raw, position)
    offset, size = _ENTRY_TAIL.unpack_from(raw, position + 8 * ndim)
    entry = TensorEntry(_decode_name(name, where), _dtype(code, name, where), shape, offset, size)
    return entry, name, position + 8 * ndim + _ENTRY_TAIL.size


def _decode_name(name: bytes, where: Path | None) -> str:
    try:
        text = name.decode()
    except UnicodeDecodeError as error:
        raise _bad_index(f"tensor name {_shown(name)} is not UTF-8", where) from error
    if not text or not text.isprintable():
        raise _bad_index(f"tensor name {_shown(name)} is empty or holds unprintable characters", where)
    return text


def _dtype(code: int, name: bytes, where: Path | None) -> DType:
    if code in LEGACY_DTYPE_CODES:
        return LEGACY_DTYPE_CODES[code]
    try:
        return DType(code)
    except ValueError:
        known = ", ".join(f"{dtype.value} {dtype.name}" for dtype in DType)
        raise UnsupportedModelFile(
            f"tensor {_shown(name)} has dtype code {code}",
            where=where,
            expected=f"one of {known}",
            remedy="convert the model again with a writer that keeps to these types",
        ) from None


def _shown(name: bytes) -> str:
    return repr(name[:60].decode(errors="replace"))


def _bad_index(what: str, where: Path | None) -> DamagedModelFile:
    return DamagedModelFile(
        what,
        where=where,
        expected="a tensor index sorted by unique names that fits the file",
        remedy="copy or download the file again, or write it again with its producer",
        falsifier=DAMAGED,
    )
