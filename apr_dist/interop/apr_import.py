"""APR v2 of another writer to ours: plain names, a tied head stored once, rows in split halves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from apr_dist.apr.layout import TOKENIZER_TEXT
from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.apr.writer import TensorSpec
from apr_dist.errors import ArchitectureRefused
from apr_dist.gates.architecture import CLAIM_KEYS, HEAD
from apr_dist.gates.model_file import refuse_shard, same_payload
from apr_dist.interop.convert import Piece, converted_pieces, encode, kept_type
from apr_dist.interop.embedding import embed_tokenizer
from apr_dist.interop.gguf_names import split_halves
from apr_dist.interop.joined import Rows, where_stored
from apr_dist.interop.request import ImportRequest, ImportSummary
from apr_dist.interop.stored_names import CLAIM, model_tensors
from apr_dist.model.config import SPLIT_HALVES, TransformerConfig
from apr_dist.model.families import family_named

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
        rows = _rows(reader, stored)
        specs = []
        for name, part in rows.items():
            entry = reader.tensors[stored[part.stored if part else name]]
            shape = entry.shape if part is None else (part.count, *entry.shape[1:])
            specs.append(TensorSpec(name, kept_type(entry, request.dtype), shape))

        def pieces() -> Iterator[tuple[str, Piece]]:
            for spec in specs:
                part = rows[spec.name]
                old = stored[part.stored if part else spec.name]
                yield from ((spec.name, one) for one in _pieces(reader, old, spec, head_dim, part))
                reader.forget(old)

        return request.write(
            pieces(),
            metadata=metadata,
            specs=specs,
            original_format="apr",
            notes=(*notes, *reordered, *more),
            may_leave_unstated=True,
        )


def _rows(reader: AprReader, stored: Mapping[str, str]) -> Mapping[str, Rows | None]:
    """Each tensor of ours, and its rows where the file holds it joined with others."""
    metadata = reader.metadata.to_mapping()
    texts = [str(metadata[key]) for key in CLAIM_KEYS if metadata.get(key)]
    family = next((one for text in texts if (one := family_named(text)) and one.definition.joined), None)
    if family is None or not any(
        f".{whole}." in name for whole in family.definition.joined for name in stored
    ):
        return dict.fromkeys(stored)
    model = TransformerConfig.from_metadata(
        metadata, family=family, where=reader.path, tie_word_embeddings=HEAD not in stored
    )
    shapes = {name: reader.tensors[old].shape for name, old in stored.items()}
    return where_stored(model, shapes, where=reader.path)


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
    reader: AprReader, name: str, spec: TensorSpec, head_dim: int | None, part: Rows | None
) -> Iterator[Piece]:
    if part is not None:
        values = np.ascontiguousarray(reader.float32(name)[part.first : part.first + part.count])
        if head_dim is not None and any(one in spec.name for one in _ROTATED):
            values = np.ascontiguousarray(split_halves(values, head_dim))
        yield encode(values, spec.dtype, name=name, where=reader.path)
        return
    if head_dim is None or not any(part in spec.name for part in _ROTATED):
        yield from converted_pieces(reader, name, spec.dtype)
        return
    values = reader.float32(name)
    if values.shape[0] % head_dim:
        yield from converted_pieces(reader, name, spec.dtype)  # its shape is the gate's to refuse
        return
    rows = np.ascontiguousarray(split_halves(values, head_dim))
    yield encode(rows, spec.dtype, name=name, where=reader.path)
