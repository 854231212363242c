"""APR v2 of another writer to ours: plain names, a tied head stored once, rows in split halves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from apr_dist.apr.layout import TOKENIZER_TEXT, DType
from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.apr.writer import TensorSpec
from apr_dist.errors import ArchitectureRefused
from apr_dist.gates.architecture import HEAD
from apr_dist.gates.model_file import refuse_shard, same_payload
from apr_dist.interop.convert import Piece, converted_pieces, encode, kept_type
from apr_dist.interop.embedding import embed_tokenizer
from apr_dist.interop.expert_layouts import joined_tensors
from apr_dist.interop.gguf_names import split_halves
from apr_dist.interop.request import ImportRequest, ImportSummary
from apr_dist.interop.stored_names import CLAIM, model_tensors
from apr_dist.model.config import SPLIT_HALVES

_ADJACENT_PAIRS = 0
"""``rope_type`` of a file whose rows of q and k keep the pairing of GGUF's llama architecture."""

_ROTATED = tuple(f".self_attn.{part}" for part in ("q_proj.", "k_proj.", "q_norm.", "k_norm."))


def import_apr(request: ImportRequest) -> ImportSummary:
    """Write the model of an APR v2 file again as this project writes and trains one.

    Raises:
        ModelFileError: the source is missing, damaged, or not supported.
        GateRefused: training would refuse the model.
        OutputError: the target cannot be written.
    """
    with AprReader(request.source) as reader:
        refuse_shard(reader, reader.path)
        stored, notes = model_tensors(
            reader.tensors,
            rope_theta=reader.metadata.rope_theta,
            values=reader.float32,
            claimed=reader.metadata.custom.get(CLAIM),
            asked=request.tie,
            equal=lambda left, right: same_payload(reader, left, right),
            where=request.source,
        )
        head_dim, reordered = _pairing(reader)
        metadata, more = _metadata(reader, tied=HEAD not in stored)
        joined = joined_tensors(stored, lambda name: reader.tensors[name].shape, where=request.source)
        specs = [
            TensorSpec(name, _common_type(reader, one.parts, request.dtype), one.shape)
            for name, one in joined.items()
        ]

        def pieces() -> Iterator[tuple[str, Piece]]:
            for spec in specs:
                for part in joined[spec.name].parts:
                    yield from ((spec.name, one) for one in _pieces(reader, part, spec, head_dim))
                    reader.forget(part)

        return request.write(
            pieces(),
            metadata=metadata,
            specs=specs,
            original_format="apr",
            notes=(*notes, *reordered, *more),
            may_leave_unstated=True,
        )


def _common_type(reader: AprReader, parts: Sequence[str], wanted: DType | None) -> DType:
    """The type that tensors are written in that are joined; F32 where theirs differ."""
    kinds = {kept_type(reader.tensors[name], wanted) for name in parts}
    return kinds.pop() if len(kinds) == 1 else DType.F32


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


def _pieces(reader: AprReader, name: str, spec: TensorSpec, head_dim: int | None) -> Iterator[Piece]:
    if head_dim is None or not any(part in spec.name for part in _ROTATED):
        yield from converted_pieces(reader, name, spec.dtype)
        return
    values = reader.float32(name)
    if values.shape[0] % head_dim:
        yield from converted_pieces(reader, name, spec.dtype)  # its shape is the gate's to refuse
        return
    rows = np.ascontiguousarray(split_halves(values, head_dim))
    yield encode(rows, spec.dtype, name=name, where=reader.path)
