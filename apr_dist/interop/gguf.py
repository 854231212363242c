"""GGUF to APR: names, dimensions and row order translated, values dequantised, streamed row by row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from apr_dist.apr.layout import DType
from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.writer import TensorSpec
from apr_dist.errors import DamagedModelFile, TokenizerError, UnsupportedModelFile
from apr_dist.interop.chat_settings import with_gguf_sampling
from apr_dist.interop.convert import CHUNK_ELEMENTS, Piece, encode
from apr_dist.interop.embedding import embed_text
from apr_dist.interop.gguf_file import GgufFile, GgufTensor
from apr_dist.interop.gguf_metadata import read_metadata
from apr_dist.interop.gguf_names import (
    EMBEDDING,
    OUTPUT,
    norm_shift,
    rotary_projection,
    split_halves,
    to_gguf,
    to_huggingface,
)
from apr_dist.interop.gguf_rope import computed_tensors
from apr_dist.interop.joined import stored_tensors, where_stored
from apr_dist.interop.request import ImportRequest, ImportSummary
from apr_dist.interop.stored_names import CLAIM, decide_tie
from apr_dist.interop.tokenizers import tokenizer_json_from_gguf
from apr_dist.model.config import TransformerConfig
from apr_dist.model.families import GgufForm

_KEPT = {"F32": DType.F32, "F16": DType.F16, "BF16": DType.BF16}


@dataclass(frozen=True)
class _Plan:
    """One tensor to be written and where its values come from.

    Attributes:
        spec: what is written.
        tensor: where its values are.
        first: row of the tensor that is its first.
        reordered_head_dim: the head size if rows are reordered.
        shift: what the file adds to the values.
    """

    spec: TensorSpec
    tensor: GgufTensor
    first: int
    reordered_head_dim: int | None
    shift: float


def import_gguf(request: ImportRequest) -> ImportSummary:
    """Write the model of a GGUF file as an APR file, with the file's tokenizer; one that cannot be is a note.

    Raises:
        ModelFileError: the source is missing, damaged, or something in it is not supported.
        OutputError: the target cannot be written.
        UsageError: the ``gguf`` package is missing, or ``tie`` is off for a file without a head.
    """
    with GgufFile(request.source) as file:
        metadata, family, notes = read_metadata(file)
        form = family.definition.gguf
        model = TransformerConfig.from_metadata(
            {"vocab_size": 1} | metadata.to_mapping(),
            family=family,
            where=file.path,
            tie_word_embeddings=OUTPUT not in file.tensors,
        )
        _check_complete(file, model, form)
        decided = decide_tie(
            [to_huggingface(name, form) for name in file.tensors],
            claimed=None,
            asked=request.tie,
            equal=lambda: _same_values(file, file.tensors[EMBEDDING], file.tensors[OUTPUT]),
            where=file.path,
        )
        plans = _plan(file, model, form, request.dtype, decided.tied)
        metadata = with_gguf_sampling(metadata.with_custom({CLAIM: decided.tied}), file.fields)
        metadata, more = _embed(metadata, file.path)

        def pieces() -> Iterator[tuple[str, Piece]]:
            for plan in plans:
                yield from ((plan.spec.name, piece) for piece in _pieces(file, plan))
                file.forget(plan.tensor)

        return request.write(
            pieces(),
            metadata=metadata,
            specs=[plan.spec for plan in plans],
            original_format="gguf",
            notes=(*decided.notes, *notes, *more),
        )


def _embed(metadata: AprMetadata, source: Path) -> tuple[AprMetadata, tuple[str, ...]]:
    try:
        content, _ = tokenizer_json_from_gguf(source)
        return embed_text(metadata, content, where=source)
    except TokenizerError as error:
        return metadata, (f"the tokenizer was not embedded: {error}",)


def _check_complete(file: GgufFile, model: TransformerConfig, form: GgufForm) -> None:
    required = [to_gguf(name, form) or name for name in stored_tensors(model)]
    missing = [name for name in required if name not in file.tensors]
    if missing:
        raise DamagedModelFile(
            f"the GGUF file lacks {len(missing)} tensors, among them {missing[0]!r}",
            where=file.path,
            expected=f"every tensor of its {model.num_layers} layers",
            remedy="take a complete file; split files must be merged first",
        )


def _same_values(file: GgufFile, left: GgufTensor, right: GgufTensor) -> bool:
    if left.shape != right.shape:
        return False
    same_type = left.type_name == right.type_name
    read = file.packed_rows if same_type else file.float32_rows
    return all(
        np.array_equal(np.asarray(read(left, first, last)), np.asarray(read(right, first, last)))
        for first, last in _row_ranges(left.rows, left.shape[-1], 1)
    )


def _plan(
    file: GgufFile, model: TransformerConfig, form: GgufForm, dtype: DType | None, tied: bool
) -> list[_Plan]:
    expected = stored_tensors(model).keys() | {"lm_head.weight"}
    left_out = {*([OUTPUT] if tied else []), *computed_tensors(form)}
    tensors: dict[str, GgufTensor] = {}
    for tensor in file.tensors.values():
        if tensor.name in left_out:
            continue
        name = to_huggingface(tensor.name, form)
        if name not in expected or name is None:
            raise UnsupportedModelFile(
                f"tensor {tensor.name!r} has no place in a {model.family} model of {model.num_layers} layers",
                where=file.path,
                expected="names of a plain decoder",
                remedy="export the model again from its Hugging Face folder",
            )
        file.float32_rows(
            tensor, 0, min(1, tensor.rows)
        )  # refuses an unknown type before anything is written
        tensors[name] = tensor
    plans = []
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for name, rows in where_stored(model, shapes, where=file.path).items():
        tensor = tensors[name if rows is None else rows.stored]
        chosen = dtype if dtype is not None else _KEPT.get(tensor.type_name, DType.F16)
        head_dim = _head_dim(file, name, tensor, model) if form.permuted else None
        first, shape = (0, tensor.shape) if rows is None else (rows.first, (rows.count, *tensor.shape[1:]))
        spec = TensorSpec(name, chosen, shape)
        plans.append(_Plan(spec, tensor, first, head_dim, norm_shift(name, form)))
    return plans


def _head_dim(file: GgufFile, name: str, tensor: GgufTensor, model: TransformerConfig) -> int | None:
    """The head size when the tensor's rows are to be reordered, after checking that heads divide it."""
    kind = rotary_projection(name)
    if kind is None:
        return None
    heads = model.num_heads if kind == "q" else model.num_kv_heads
    if heads * model.head_dim != tensor.shape[0]:
        raise DamagedModelFile(
            f"tensor {tensor.name!r} has {tensor.shape[0]} rows",
            where=file.path,
            expected=f"{heads} heads of {model.head_dim}",
            remedy="export the model again from its Hugging Face folder",
        )
    return model.head_dim


def _pieces(file: GgufFile, plan: _Plan) -> Iterator[npt.NDArray[Any]]:
    """The tensor's elements in the target's dtype and row order, some rows at a time."""
    tensor, spec, head_dim = plan.tensor, plan.spec, plan.reordered_head_dim
    bias = len(tensor.shape) == 1
    keep = _KEPT.get(tensor.type_name) is spec.dtype and not head_dim and not plan.shift
    for begin, end in _row_ranges(math.prod(spec.shape[:-1]), tensor.shape[-1], 1 if bias else head_dim or 1):
        first, last = plan.first + begin, plan.first + end
        if keep:
            yield np.frombuffer(file.packed_rows(tensor, first, last), np.uint8)
            continue
        values = file.float32_rows(tensor, first, last)
        if head_dim:
            values = split_halves(values.reshape(-1) if bias else values, head_dim)
        if plan.shift:
            values = values - np.float32(plan.shift)
        yield encode(values, spec.dtype, name=tensor.name, where=file.path)


def _row_ranges(rows: int, columns: int, multiple: int) -> Iterator[tuple[int, int]]:
    """Consecutive row ranges of about ``CHUNK_ELEMENTS`` values, each a multiple of ``multiple`` rows."""
    step = max(1, CHUNK_ELEMENTS // max(1, columns) // multiple) * multiple
    for first in range(0, rows, step):
        yield first, min(rows, first + step)
