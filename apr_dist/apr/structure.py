"""Whether the parts of an APR v2 file agree with each other and with the file's length.

Pure checks over header, index and sizes, for files from strangers: no length is trusted before it was
compared with what is really there. Checksums of contents are the reader's business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from apr_dist.apr.layout import (
    ALIGNMENT,
    BLOCKS,
    DAMAGED,
    FOOTER_BYTES,
    HEADER_BYTES,
    MAGIC,
    MAX_METADATA_BYTES,
    VERSION,
    DType,
    Flag,
    Header,
    TensorEntry,
    align,
    payload_bytes,
)
from apr_dist.errors import DamagedModelFile, NotAModelFile, UnsupportedModelFile

WRONG_MAGIC: Final = "FALSIFY-APR-PRETRAIN-INIT-004"
"""Falsifier of every refusal of an empty file or another format."""

_OLD_MAGICS = {b"APRN": "APR v1", b"APR1": "APR v1", b"APR2": "an early APR v2 draft"}
REFUSED_FLAGS: Final = {
    Flag.LZ4: "its contents are LZ4-compressed",
    Flag.ZSTD: "its contents are zstd-compressed",
    Flag.ENCRYPTED: "its contents are encrypted",
    Flag.SIGNED: "it carries a signature that cannot be checked",
    Flag.COLUMN_MAJOR: "its matrices are column-major, the mark of an unfinished conversion",
}
"""Header flags that end the reading of a file, each with what it says of the file."""

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_KNOWN_FLAGS = sum(Flag)
_MAX_ELEMENTS = 1 << 48


def check_magic(head: bytes, *, where: Path) -> None:
    """Refuse an empty file, another format, and older versions of this one.

    Raises:
        NotAModelFile: empty, or the first four bytes are no APR magic.
        UnsupportedModelFile: an older version, named.
    """
    magic = head[: len(MAGIC)]
    if magic == MAGIC:
        return
    if magic in _OLD_MAGICS:
        raise UnsupportedModelFile(
            f"the file is {_OLD_MAGICS[magic]} (magic {magic.decode()!r})",
            where=where,
            expected="APR v2",
            remedy="apr-dist import old.apr -o new.apr"
            if magic == b"APR1"
            else "convert it to APR v2 with the tool that wrote it",
            falsifier=WRONG_MAGIC,
        )
    raise NotAModelFile(
        "the file is empty" if not head else f"the file begins with {magic!r}",
        where=where,
        expected=f"an APR v2 file, which begins with {MAGIC!r}",
        remedy="check the path; import other formats with apr-dist import",
        falsifier=WRONG_MAGIC,
    )


def check_header(header: Header, file_bytes: int, *, where: Path) -> None:
    """Version, flags, and whether the four parts lie in order inside ``file_bytes``.

    Raises:
        UnsupportedModelFile: another version, a refused or unknown flag, metadata beyond 16 MiB.
        DamagedModelFile: the parts overlap or lie outside the file.
    """
    if header.version != VERSION:
        raise UnsupportedModelFile(
            f"the file is APR version {'.'.join(map(str, header.version))}",
            where=where,
            expected=f"version {'.'.join(map(str, VERSION))}",
            remedy="convert it with the tool that wrote it",
        )
    _check_flags(header.flags, where)
    metadata_end = header.metadata_offset + header.metadata_size
    ends = (HEADER_BYTES, header.metadata_offset, metadata_end, header.index_offset, header.data_offset)
    if list(ends) != sorted(ends) or header.data_offset % ALIGNMENT:
        raise _damaged(
            f"the header places metadata at {header.metadata_offset} to {metadata_end}, the index at "
            f"{header.index_offset} and tensor data at {header.data_offset}",
            where,
            "these parts one after the other, data at a multiple of 64",
        )
    if header.data_offset + FOOTER_BYTES > file_bytes:
        raise _truncated(file_bytes, header.data_offset + FOOTER_BYTES, where)
    if header.metadata_size > MAX_METADATA_BYTES:
        raise UnsupportedModelFile(
            f"the metadata is {header.metadata_size} bytes long",
            where=where,
            expected=f"at most {MAX_METADATA_BYTES}",
            remedy="write the file again without what does not belong into metadata",
        )


def _check_flags(flags: Flag, where: Path) -> None:
    reasons = [f"{reason} (flag {flag.name})" for flag, reason in REFUSED_FLAGS.items() if flags & flag]
    unknown = flags & ~_KNOWN_FLAGS
    if unknown:
        reasons.append(f"it sets flag bits nobody defined ({int(unknown):#06x})")
    if reasons:
        raise UnsupportedModelFile(
            "the file cannot be read: " + " and ".join(reasons),
            where=where,
            expected="a plain, row-major APR v2 file",
            remedy="write it again with its producer, without these options",
        )


def check_extents(
    header: Header,
    entries: Sequence[TensorEntry],
    file_bytes: int,
    *,
    where: Path,
    footer_required: bool = True,
) -> bool:
    """Sizes against shapes, alignment, overlap, and the file's length; tell whether a footer is there.

    Raises:
        DamagedModelFile: any of these is wrong.
        UnsupportedModelFile: a quantised tensor whose packing its size does not settle.
    """
    data_end = header.data_offset
    previous: TensorEntry | None = None
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.size_bytes)):
        _check_size(entry, where)
        if entry.offset % ALIGNMENT:
            raise _damaged(
                f"tensor {entry.name!r} lies at offset {entry.offset}", where, f"a multiple of {ALIGNMENT}"
            )
        if entry.size_bytes and previous and entry.offset < previous.offset + previous.size_bytes:
            raise _damaged(
                f"tensors {previous.name!r} and {entry.name!r} overlap", where, "each byte in one tensor only"
            )
        data_end = max(data_end, header.data_offset + entry.offset + align(entry.size_bytes))
        if entry.size_bytes:
            previous = entry
    if file_bytes == data_end and not footer_required:
        return False
    if file_bytes < data_end + FOOTER_BYTES:
        raise _truncated(file_bytes, data_end + FOOTER_BYTES, where)
    return True


def without_placeholder(entries: list[TensorEntry]) -> list[TensorEntry]:
    """The entries that hold values: a tied head that is listed with its shape and no byte is none of them.

    Another writer of the format announces the shared matrix twice and stores it once.
    """
    shapes = {entry.name: entry.shape for entry in entries}
    return [
        entry
        for entry in entries
        if entry.name != _HEAD or entry.size_bytes or entry.shape != shapes.get(_EMBEDDING)
    ]


def _check_size(entry: TensorEntry, where: Path) -> None:
    if math.prod(max(1, size) for size in entry.shape) > _MAX_ELEMENTS:
        raise _damaged(
            f"tensor {entry.name!r} claims the shape {list(entry.shape)}", where, "a shape memory can address"
        )
    if entry.size_bytes == payload_bytes(entry.dtype, entry.shape):
        if rows_are_padded(entry) is None:
            raise UnsupportedModelFile(
                f"tensor {entry.name!r} is {entry.dtype.name} with rows of {entry.shape[-1]} values, "
                "and its size fits both padded and unpadded rows",
                where=where,
                expected="rows of a multiple of 256 values",
                remedy="write it again as F16",
            )
        return
    if rows_are_padded(entry):
        return
    raise _damaged(
        f"tensor {entry.name!r} ({entry.dtype.name}, shape {list(entry.shape)}) has {entry.size_bytes} bytes",
        where,
        f"{payload_bytes(entry.dtype, entry.shape)} bytes",
    )


def rows_are_padded(entry: TensorEntry) -> bool | None:
    """Whether each row of a Q4_K or Q6_K tensor fills its last block by itself; None if undecidable.

    One writer packs the values of a matrix without gaps, another starts every row at a new block.
    """
    if entry.dtype not in (DType.Q4_K, DType.Q6_K) or len(entry.shape) < 2:
        return False
    values, block_bytes = BLOCKS[entry.dtype]
    rows, columns = math.prod(entry.shape[:-1]), entry.shape[-1]
    if columns % values == 0:
        return False
    padded = rows * -(-columns // values) * block_bytes
    if padded == payload_bytes(entry.dtype, entry.shape):
        return None if rows > 1 else False
    return entry.size_bytes == padded


def _truncated(found: int, needed: int, where: Path) -> DamagedModelFile:
    return DamagedModelFile(
        f"the file is truncated: it has {found} bytes",
        where=where,
        expected=f"at least {needed}, from its own header and index",
        remedy="copy or download it again",
        falsifier=DAMAGED,
    )


def _damaged(what: str, where: Path, expected: str) -> DamagedModelFile:
    return DamagedModelFile(
        what,
        where=where,
        expected=expected,
        remedy="copy or download the file again, or write it again with its producer",
        falsifier=DAMAGED,
    )
