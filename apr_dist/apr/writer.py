"""Writing an APR v2 file: layout fixed up front, tensors in any order, in place only when complete."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from apr_dist.apr.checksum import combine, crc32_of
from apr_dist.apr.layout import (
    FOOTER_BYTES,
    HEADER_BYTES,
    MAX_DIMS,
    MAX_METADATA_BYTES,
    MAX_NAME_BYTES,
    MAX_TENSORS,
    VOCABULARY,
    WRITABLE,
    DType,
    Flag,
    Header,
    TensorEntry,
    align,
    pack_index,
    payload_bytes,
)
from apr_dist.apr.metadata import AprMetadata
from apr_dist.atomic_files import AtomicFile
from apr_dist.errors import OutputError

_PIECE_BYTES = 1 << 20  # written and summed at a time: the second finds it in the processor's cache


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written: Hugging Face name, element type, shape (outermost first)."""

    name: str
    dtype: DType
    shape: tuple[int, ...]


@dataclass(slots=True)
class _Progress:
    written: int = 0
    crc: int = 0


class AprWriter:
    """A new APR v2 file; use it in a ``with`` block, which must give every tensor exactly once.

    Args:
        path: the file to make; it appears complete when the block ends well, or not at all.
        metadata: written as given; ``total_size`` (payload bytes of all tensors) and ``param_count``
            (elements of all tensors) are filled in where they are None.
        tensors: what will be written; the index and the data are laid out sorted by name.
        flags: header flags; HAS_VOCAB is added when the metadata hold ``tokenizer.vocabulary``.
        overwrite: whether an existing file may be replaced.
        verbatim: allow dtypes that new files should not hold, for copying payloads unread.
        prove: called with the finished file, still under a temporary name; what it raises discards the file.

    Raises:
        OutputError: the target exists, cannot be written, or what was asked for is no valid file.
    """

    def __init__(
        self,
        path: Path,
        *,
        metadata: AprMetadata,
        tensors: Sequence[TensorSpec],
        flags: Flag = Flag.ROW_MAJOR,
        overwrite: bool = False,
        verbatim: bool = False,
        prove: Callable[[Path], None] | None = None,
    ) -> None:
        self.path = Path(path)
        self._prove = prove
        self._check_specs(tensors, verbatim)
        entries = _place(tensors)
        self.metadata = metadata.replace(
            total_size=_filled(metadata.total_size, sum(entry.size_bytes for entry in entries)),
            param_count=_filled(metadata.param_count, sum(entry.num_elements for entry in entries)),
        )
        self._entries = {entry.name: entry for entry in entries}
        self._progress = {entry.name: _Progress() for entry in entries}
        self._head, self._data_offset = self._build_head(flags)
        self._file = AtomicFile(self.path, overwrite=overwrite)

    def _build_head(self, flags: Flag) -> tuple[bytes, int]:
        metadata, index = self.metadata.dump(), pack_index(self._entries.values())
        if len(metadata) > MAX_METADATA_BYTES:
            raise self._refused(f"the metadata is {len(metadata)} bytes", f"at most {MAX_METADATA_BYTES}")
        index_offset = HEADER_BYTES + align(len(metadata))
        data_offset = index_offset + align(len(index))
        if VOCABULARY in self.metadata.custom:
            flags |= Flag.HAS_VOCAB
        header = Header(flags, len(self._entries), len(metadata), index_offset, data_offset).pack()
        head = (header + metadata).ljust(index_offset, b"\0") + index
        return head.ljust(data_offset, b"\0"), data_offset

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._file.discard()
            return
        try:
            self._finish()
            if self._prove:
                self._prove(self._file.temporary)
        except BaseException:
            self._file.discard()
            raise
        self._file.commit()

    def write(self, name: str, data: Any) -> None:
        """Write a whole tensor: any contiguous buffer of exactly its payload's size.

        Raises:
            OutputError: no such tensor was announced, it was written before, the size is wrong, or
                the disk refuses.
        """
        entry, view = self._expected(name), self._bytes_of(name, data)
        if self._progress[name].written or len(view) != entry.size_bytes:
            raise self._refused(
                f"{len(view)} bytes given for tensor {name!r} after {self._progress[name].written}",
                f"{entry.size_bytes} bytes, once",
            )
        self.append(name, view)

    def append(self, name: str, piece: Any) -> None:
        """Write the next piece of a tensor; pieces of different tensors may alternate.

        Raises:
            OutputError: as ``write``; also when the pieces exceed the tensor.
        """
        entry, view, done = self._expected(name), self._bytes_of(name, piece), self._progress[name]
        if done.written + len(view) > entry.size_bytes:
            raise self._refused(
                f"{done.written + len(view)} bytes given for tensor {name!r}", f"{entry.size_bytes} bytes"
            )
        start = self._data_offset + entry.offset
        for first in range(0, len(view), _PIECE_BYTES):
            part = view[first : first + _PIECE_BYTES]
            self._file.write_at(start + done.written, part)
            done.crc = crc32_of(part, done.crc)
            done.written += len(part)

    def _finish(self) -> None:
        """Write head, paddings and footer; the checksum comes from the pieces', nothing is read again."""
        for entry in self._entries.values():
            written = self._progress[entry.name].written
            if written != entry.size_bytes:
                raise self._refused(
                    f"tensor {entry.name!r} got {written} of its {entry.size_bytes} bytes",
                    "every announced tensor, whole",
                )
        self._file.write_at(0, self._head)
        total, end = crc32_of(self._head), self._data_offset
        for entry in self._entries.values():
            padding = bytes(align(entry.size_bytes) - entry.size_bytes)
            end = self._data_offset + entry.offset + entry.size_bytes
            self._file.write_at(end, padding)
            total = crc32_of(padding, combine(total, self._progress[entry.name].crc, entry.size_bytes))
            end += len(padding)
        self._file.write_at(end, total.to_bytes(FOOTER_BYTES, "little"))

    def _expected(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise self._refused(f"tensor {name!r} was not announced", f"one of {len(self._entries)} tensors")
        return self._entries[name]

    def _bytes_of(self, name: str, data: Any) -> memoryview:
        view = memoryview(data)
        if not view.c_contiguous:
            raise self._refused(f"the buffer for tensor {name!r} is not contiguous", "a C-contiguous buffer")
        return view.cast("B") if view.nbytes else memoryview(b"")

    def _check_specs(self, specs: Sequence[TensorSpec], verbatim: bool) -> None:
        if len(specs) > MAX_TENSORS:
            raise self._refused(f"{len(specs)} tensors", f"at most {MAX_TENSORS}")
        seen: set[str] = set()
        for spec in specs:
            if spec.name in seen:
                raise self._refused(f"tensor {spec.name!r} is announced twice", "unique names")
            seen.add(spec.name)
            if not spec.name.isprintable() or not 0 < len(spec.name.encode()) <= MAX_NAME_BYTES:
                raise self._refused(
                    f"tensor name {spec.name[:60]!r}", f"1 to {MAX_NAME_BYTES} bytes of printable text"
                )
            if len(spec.shape) > MAX_DIMS or any(size < 0 for size in spec.shape):
                raise self._refused(
                    f"tensor {spec.name!r} has the shape {list(spec.shape)}", f"at most {MAX_DIMS} dimensions"
                )
            if spec.dtype not in WRITABLE and not verbatim:
                raise self._refused(
                    f"tensor {spec.name!r} is {spec.dtype.name}",
                    "F32, F16 or BF16, which every reader understands alike",
                )

    def _refused(self, what: str, expected: str) -> OutputError:
        return OutputError(
            f"the file cannot be written: {what}",
            where=self.path,
            expected=expected,
            remedy="correct what is being written",
        )


def _place(specs: Sequence[TensorSpec]) -> list[TensorEntry]:
    entries: list[TensorEntry] = []
    offset = 0
    for spec in sorted(specs, key=lambda spec: spec.name.encode()):
        size = payload_bytes(spec.dtype, spec.shape)
        entries.append(TensorEntry(spec.name, spec.dtype, tuple(map(int, spec.shape)), offset, size))
        offset += align(size)
    return entries


def _filled(given: int | None, counted: int) -> int:
    return counted if given is None else given
