"""APR files for tests: good ones through the writer, hostile ones byte by byte with valid checksums."""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from apr_dist.apr.layout import DType, Flag, Header, align
from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.writer import AprWriter, TensorSpec

_DTYPES = {"<f4": DType.F32, "<f2": DType.F16, "<u2": DType.BF16}

GOLDEN_METADATA: Mapping[str, Any] = {
    "model_type": "linear_regression",
    "name": "golden-v2",
    "version": "0.0.0-golden",
    "created_at": "1700000000",
    "total_size": 0,
    "param_count": 8,
}
GOLDEN_TENSORS: Mapping[str, npt.NDArray[np.float32]] = {
    "weights": np.array([1, 2, 0.5, -0.5, 4, -2, 0.25, 8], np.float32),
    "bias": np.array([0.125], np.float32),
}

RawEntry = tuple[bytes, int, Sequence[int], int, int]
"""Name, dtype code, dims, offset and size of an index entry, none of them checked."""


def write_apr(
    path: Path,
    tensors: Mapping[str, npt.NDArray[Any]],
    metadata: Mapping[str, Any] | None = None,
    *,
    flags: Flag = Flag.ROW_MAJOR,
    overwrite: bool = False,
) -> Path:
    """Write arrays (float32, float16, or uint16 for BF16) and flat metadata as an APR file."""
    specs = [TensorSpec(name, _DTYPES[array.dtype.str], array.shape) for name, array in tensors.items()]
    facts = AprMetadata.from_mapping(metadata or {})
    with AprWriter(path, metadata=facts, tensors=specs, flags=flags, overwrite=overwrite) as writer:
        for name, array in tensors.items():
            writer.write(name, np.ascontiguousarray(array))
    return path


def write_golden(path: Path) -> Path:
    """The published 516-byte file, made by our writer."""
    return write_apr(path, GOLDEN_TENSORS, GOLDEN_METADATA)


def assemble(
    entries: Sequence[RawEntry],
    data: bytes,
    *,
    metadata: bytes = b"{}",
    count: int | None = None,
    flags: int = Flag.ROW_MAJOR,
    **overrides: int,
) -> bytes:
    """A file with valid checksums whose index, metadata and header fields (``overrides``) may all lie."""
    index = b"".join(
        struct.pack("<H", len(name))
        + name
        + bytes((code, len(dims)))
        + struct.pack(f"<{len(dims)}QQQ", *dims, offset, size)
        for name, code, dims, offset, size in entries
    )
    index_offset = 64 + align(len(metadata))
    data_offset = index_offset + align(len(index))
    fields = {
        "metadata_size": len(metadata),
        "index_offset": index_offset,
        "data_offset": data_offset,
    } | overrides
    header = Header(Flag(flags), len(entries) if count is None else count, **fields).pack()
    body = (header + metadata).ljust(index_offset, b"\0") + index
    return seal(body.ljust(data_offset, b"\0") + data)


def seal(body: bytes) -> bytes:
    """``body`` followed by the footer that makes it whole."""
    return body + zlib.crc32(body).to_bytes(4, "little")


def flipped(content: bytes, position: int, mask: int = 0xFF) -> bytes:
    """``content`` with some bits of one byte turned over."""
    return content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :]


_NOBODY = 65534


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """A temporary folder that belongs to ``unprivileged`` code and is reachable by it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "work"
        Path(name).chmod(0o755)
        folder.mkdir(mode=0o755)
        if os.geteuid() == 0:
            os.chown(folder, _NOBODY, _NOBODY)
        yield folder
        folder.chmod(0o755)


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Code that file permissions apply to, even when the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(_NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def write_gguf(
    path: Path,
    tensors: Mapping[str, npt.NDArray[Any]],
    *,
    architecture: str = "llama",
    fields: Mapping[str, Any] | None = None,
    quantization: Mapping[str, str] | None = None,
) -> Path:
    """A GGUF file by the ``gguf`` package: float tensors, some quantised to the GGML type named for them.

    ``fields`` are written with the type their Python value suggests; int becomes u32, float f32.
    """
    import gguf  # noqa: PLC0415 - a test of another format needs it, the others do not

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (fields or {}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    for name, array in tensors.items():
        kind = (quantization or {}).get(name)
        if kind is None:
            writer.add_tensor(name, array)
        else:
            quantised = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(array, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
