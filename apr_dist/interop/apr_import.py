"""APR v2 of another writer to ours: plain names, a tied head stored once, rows in split halves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from apr_dist.apr.layout import TOKENIZER_TEXT, WRITABLE, DType
from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.apr.writer import TensorSpec
from apr_dist.errors import ArchitectureRefused
from apr_dist.gates.architecture import EMBEDDING, HEAD
from apr_dist.gates.model_file import refuse_shard, same_payload
from apr_dist.interop.convert import (
    ImportSummary,
    Progress,
    converted_pieces,
    encode,
    summarize,
    total_bytes,
)
from apr_dist.interop.embedding import embed_tokenizer
from apr_dist.interop.gguf_names import split_halves
from apr_dist.interop.proven import proven_writer
from apr_dist.interop.stored_names import model_names
from apr_dist.interop.tie import CLAIM, decide_tie
from apr_dist.model.config import SPLIT_HALVES

_ADJACENT_PAIRS = 0
"""``rope_type`` of a file whose rows of q and k keep the pairing of GGUF's llama architecture."""

_ROTATED = tuple(f".self_attn.{part}" for part in ("q_proj.", "k_proj.", "q_norm.", "k_norm."))


def import_apr(
    source: Path,
    target: Path,
    *,
    dtype: DType | None = None,
    tie: bool | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ImportSummary:
    """Write the model of an APR v2 file again as this project writes and trains one.

    Args:
        source: APR v2 file of any writer.
        target: APR file to make.
        dtype: element type of every tensor; None keeps F32, F16 and BF16 and makes the rest F16.
        tie: whether the head is the embedding; None follows metadata and tensors.
        overwrite: whether ``target`` may exist.
        progress: called with (bytes written, bytes in all).

    Raises:
        ModelFileError: the source is missing, damaged, or not supported.
        GateRefused: training would refuse the model.
        OutputError: the target cannot be written.
    """
    unstated: list[str] = []
    with AprReader(source) as reader:
        refuse_shard(reader, reader.path)
        plain, notes = model_names(
            reader.tensors, rope_theta=reader.metadata.rope_theta, values=reader.float32, where=source
        )
        stored = {new: old for old, new in plain.items()}
        claim = reader.metadata.custom.get(CLAIM)
        decided = decide_tie(
            stored,
            claimed=claim,
            asked=tie,
            equal=lambda: same_payload(reader, stored[HEAD], stored[EMBEDDING]),
            where=source,
        )
        if decided.tied and HEAD in stored:
            head = stored.pop(HEAD)
            stored |= {EMBEDDING: head} if decided.renamed else {}
        head_dim, reordered = _pairing(reader)
        metadata, more = _metadata(reader, tied=decided.tied)
        specs = [_spec(reader, old, new, dtype) for new, old in stored.items()]
        done, total = 0, total_bytes(specs)
        with proven_writer(
            target,
            metadata=metadata,
            tensors=specs,
            source=reader.path,
            overwrite=overwrite,
            unstated=unstated,
        ) as writer:
            for spec in specs:
                for piece in _pieces(reader, stored[spec.name], spec, head_dim):
                    writer.append(spec.name, piece)
                    done += piece.nbytes
                    if progress:
                        progress(done, total)
                reader.forget(stored[spec.name])
    notes = (*notes, *decided.notes, *reordered, *more, *unstated)
    return summarize(source, target, "apr", specs, tied=decided.tied, notes=notes)


def _spec(reader: AprReader, old: str, new: str, dtype: DType | None) -> TensorSpec:
    entry = reader.tensors[old]
    kept = entry.dtype if entry.dtype in WRITABLE else DType.F16
    return TensorSpec(new, kept if dtype is None else dtype, entry.shape)


def _pairing(reader: AprReader) -> tuple[int | None, tuple[str, ...]]:
    """The head size where rows have to be reordered, else None; and the note that says so."""
    metadata = reader.metadata
    if metadata.rope_type != _ADJACENT_PAIRS:
        return None, ()
    head_dim = metadata.head_dim or (metadata.hidden_size or 0) // (metadata.num_heads or 1)
    if head_dim < 2 or head_dim % 2:
        raise ArchitectureRefused(
            f"rope_type is {_ADJACENT_PAIRS} and the size of a head is {head_dim or 'not stated'}",
            where=reader.path,
            expected="an even head_dim, or hidden_size and num_heads, to reorder the rows of q and k by",
            remedy="import the model from its own source",
        )
    return head_dim, (
        "rows of q and k were reordered from adjacent pairs to split halves (rope_type 0 to 2)",
    )


def _metadata(reader: AprReader, *, tied: bool) -> tuple[AprMetadata, tuple[str, ...]]:
    changes: dict[str, Any] = {"total_size": None, "param_count": None, "quantization": None}
    if reader.metadata.rope_type == _ADJACENT_PAIRS:
        changes["rope_type"] = SPLIT_HALVES
    metadata = reader.metadata.replace(**changes).with_custom({CLAIM: tied})
    beside = reader.path.with_suffix(".tokenizer")
    if TOKENIZER_TEXT not in metadata.custom and beside.is_dir():
        return embed_tokenizer(metadata, beside)
    return metadata, ()


def _pieces(
    reader: AprReader, name: str, spec: TensorSpec, head_dim: int | None
) -> Iterator[npt.NDArray[Any] | memoryview]:
    if head_dim is None or not any(part in spec.name for part in _ROTATED):
        yield from converted_pieces(reader, name, spec.dtype)
        return
    values = reader.float32(name)
    if values.shape[0] % head_dim:
        yield from converted_pieces(reader, name, spec.dtype)  # its shape is the gate's to refuse
        return
    rows = np.ascontiguousarray(split_halves(values, head_dim))
    yield encode(rows, spec.dtype, name=name, where=reader.path)
