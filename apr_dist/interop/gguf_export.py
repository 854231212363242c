"""APR to GGUF: names and row order as llama.cpp wants them, weights as F32, F16 or Q8_0.

A file takes its name only after it was read back and says what the source says (``gguf_check``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from apr_dist.apr.reader import AprReader
from apr_dist.atomic_files import atomic_path
from apr_dist.errors import UnsupportedModelFile
from apr_dist.gates.architecture import HEAD
from apr_dist.gates.model_file import prove_model
from apr_dist.interop.chat_settings import gguf_sampling, stated_template
from apr_dist.interop.convert import Progress, counted
from apr_dist.interop.gguf_check import check_read_back, refuse_too_large
from apr_dist.interop.gguf_file import load_gguf_package
from apr_dist.interop.gguf_metadata import query_scalar
from apr_dist.interop.gguf_names import (
    ROPE_FACTORS,
    adjacent_pairs,
    all_gguf,
    norm_shift,
    part_of,
    rotary_projection,
)
from apr_dist.interop.gguf_rope import rope_divisors, rope_fields
from apr_dist.interop.gguf_tokenizer import GgufTokenizer, gguf_tokenizer
from apr_dist.interop.hf_export import ExportSummary
from apr_dist.model.config import TransformerConfig
from apr_dist.model.families import GGUF_KEYS, GgufForm, layer_kinds, rope_layers
from apr_dist.model.rope_scaling import RopeScalingType


class GgufType(StrEnum):
    """How the matrices of an exported GGUF are stored; vectors are always F32."""

    F32 = "f32"
    F16 = "f16"
    Q8_0 = "q8_0"


_FILE_TYPES = {GgufType.F32: "ALL_F32", GgufType.F16: "MOSTLY_F16", GgufType.Q8_0: "MOSTLY_Q8_0"}
_Q8_BLOCK = 32


def export_gguf(
    source: Path,
    target: Path,
    *,
    kind: GgufType = GgufType.F16,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportSummary:
    """Write an APR file as GGUF, its embedded tokenizer included.

    Args:
        source: APR file of a model of one of the families.
        target: GGUF file to make.
        kind: how matrices are stored; rows that Q8_0 cannot divide stay F16.
        overwrite: whether ``target`` may exist.
        progress: told how far the writing is.

    Raises:
        ModelFileError: the source cannot be read, or holds something GGUF has no place for.
        ArchitectureRefused: the source's family or dimensions are not known.
        OutputError: the target cannot be written.
        UsageError: the ``gguf`` package is not installed.
    """
    gguf = load_gguf_package()
    with AprReader(source) as reader:
        model = prove_model(reader).config
        _refuse_unsayable(model, reader.path)
        form = model.family.definition.gguf
        names = _names(reader, model, form)
        tokenizer = gguf_tokenizer(
            reader.metadata,
            rows=model.vocab_size,
            prefer=model.family.definition.pre_tokenizers,
            where=reader.path,
        )
        with atomic_path(Path(target), overwrite=overwrite) as path:
            writer = gguf.GGUFWriter(path, form.architecture)
            try:
                writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
                _add_fields(writer, reader, model, form.architecture)
                if tokenizer is not None:
                    _add_tokenizer(writer, tokenizer, reader)
                types = _write_tensors(writer, reader, names, model, kind, progress)
            finally:
                writer.close()
            check_read_back(path, reader, names, model)
    return ExportSummary(
        source=Path(source),
        target=Path(target),
        format="gguf",
        tensor_count=sum(map(len, names.values())),
        size_bytes=Path(target).stat().st_size,
        dtypes=types,
        files=(Path(target).name,),
        notes=() if tokenizer else ("no tokenizer is embedded in the file: none was written",),
    )


def _refuse_unsayable(model: TransformerConfig, where: Path) -> None:
    """Refuse what llama.cpp would compute differently because a GGUF file has no word for it."""
    scaling, form = model.rope_scaling, model.family.definition.gguf
    facts, what = model.family.definition, None
    window = model.sliding_window
    if facts.full_every is None and window is not None and window < model.max_position_embeddings:
        what = f"its window of {window} tokens"
    if facts.full_every is not None and model.layer_types != _kinds_read(model, facts.full_every):
        what = "which of its layers have a window"
    if facts.no_rope_every is not None and model.no_rope_layers != rope_layers(
        model.num_layers, facts.no_rope_every
    ):
        what = "which of its layers rotate nothing"
    if not form.exported:
        what = f"the blocks of {model.family}"
    scalar = query_scalar(form, model.num_layers, vars(model))
    if form.norms_routes not in (None, model.normed_routes):
        normed = "are" if model.normed_routes else "are not"
        what = f"that a token's weights of its experts {normed} divided by their sum"
    if model.query_pre_attn_scalar not in (None, scalar):
        what = f"query_pre_attn_scalar {model.query_pre_attn_scalar:g} (llama.cpp computes with {scalar})"
    if scaling is not None and scaling.rope_type is RopeScalingType.LLAMA3 and not form.rope_factors:
        what = f"the rotary scaling {scaling.rope_type.value} of a {model.family} model"
    if what is not None:
        raise UnsupportedModelFile(
            f"a GGUF file cannot state {what}",
            where=where,
            expected="a model that llama.cpp computes as it is",
            remedy="export to a Hugging Face folder instead",
        )


def _kinds_read(model: TransformerConfig, full_every: int) -> tuple[str, ...]:
    """The kinds of layers that llama.cpp gives the model."""
    return layer_kinds(model.num_layers, full_every if any(model.windows) else 1)


def _names(reader: AprReader, model: TransformerConfig, form: GgufForm) -> dict[str, tuple[str, ...]]:
    """GGUF names by Hugging Face name, in index order; a tied head is left out."""
    names: dict[str, tuple[str, ...]] = {}
    for name in reader.tensors:
        if model.tie_word_embeddings and name == HEAD:
            continue
        translated = all_gguf(name, form)
        if not translated:
            raise UnsupportedModelFile(
                f"tensor {name!r} has no place in a GGUF file",
                where=reader.path,
                expected="the tensors of a plain decoder",
                remedy="export to a Hugging Face folder instead",
            )
        names[name] = translated
    return names


def _add_fields(writer: Any, reader: AprReader, model: TransformerConfig, architecture: str) -> None:
    metadata = reader.metadata
    for key, text in {
        "general.name": metadata.name,
        "general.author": metadata.author,
        "general.description": metadata.description,
        "general.license": metadata.license,
        "general.version": metadata.version,
    }.items():
        if text:
            writer.add_string(key, text)
    values: dict[str, str | int | float] = {
        **_stated(model),
        "vocab_size": model.vocab_size,
        "attention.value_length": model.head_dim,
        "rope.dimension_count": model.head_dim,
        "rope.freq_base": float(model.rope_theta),
        **rope_fields(model.rope_scaling, reader.path),
    }
    for key, value in values.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{architecture}.{key}", value)


def _stated(model: TransformerConfig) -> dict[str, Any]:
    """Fields of the model by their keys, the family's own over those that all have."""
    keys = {**GGUF_KEYS, **model.family.definition.gguf.keys}
    values = {key: getattr(model, rule.ours) for key, rule in keys.items() if rule.ours is not None}
    if not any(model.windows):
        values.pop("attention.sliding_window", None)
    return {key: value for key, value in values.items() if value is not None}


def _add_tokenizer(writer: Any, tokenizer: GgufTokenizer, reader: AprReader) -> None:
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    if tokenizer.merges is not None:
        writer.add_token_merges(tokenizer.merges)
    if tokenizer.scores is not None:
        writer.add_token_scores(tokenizer.scores)
    writer.add_add_space_prefix(tokenizer.add_space_prefix)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(tokenizer.add_eos)
    for key, index in tokenizer.special_ids.items():
        writer.add_uint32(f"tokenizer.ggml.{key}", index)
    if template := stated_template(reader.metadata, reader.path):
        writer.add_chat_template(template)
    for key, value in gguf_sampling(reader.metadata, reader.path).items():
        (writer.add_int32 if key.endswith("top_k") else writer.add_float32)(key, value)


def _write_tensors(
    writer: Any,
    reader: AprReader,
    names: Mapping[str, tuple[str, ...]],
    model: TransformerConfig,
    kind: GgufType,
    progress: Progress | None,
) -> dict[str, int]:
    gguf = load_gguf_package()
    types = {name: _type_of(name, reader.tensors[name].shape, kind, gguf) for name in names}
    divisors = rope_divisors(model.rope_scaling, theta=model.rope_theta, head_dim=model.head_dim)
    total = 0
    if divisors is not None:
        writer.add_tensor_info(ROPE_FACTORS, divisors.shape, divisors.dtype, divisors.nbytes)
    for name, translated in names.items():
        shape = _shape_of_part(reader.tensors[name].shape, len(translated))
        values, size = gguf.GGML_QUANT_SIZES[types[name]]
        n_bytes = math.prod(shape) // values * size
        for one in translated:
            writer.add_tensor_info(one, shape, np.dtype(np.float32), n_bytes, raw_dtype=types[name])
            total += n_bytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if divisors is not None:
        writer.write_tensor_data(divisors)
    report = counted(progress, total)
    for name, translated in names.items():
        rows = _rows(reader, name, model)
        refuse_too_large(rows, types[name].name, name=name, where=reader.path)
        for index in range(len(translated)):
            part = np.ascontiguousarray(part_of(rows, index, len(translated)))
            stored = gguf.quantize(part, types[name])
            writer.write_tensor_data(stored)
            report(stored.nbytes)
        reader.forget(name)
    written = (types[name].name for name, translated in names.items() for _ in translated)
    return dict(Counter(written).most_common())


def _shape_of_part(shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """The shape of each of a tensor's parts."""
    return shape if parts == 1 else (shape[0], shape[1] // parts, *shape[2:])


def _type_of(name: str, shape: tuple[int, ...], kind: GgufType, gguf: Any) -> Any:
    """Vectors and routers F32; matrices as asked, or F16 where a row is no multiple of Q8_0's block."""
    types = gguf.GGMLQuantizationType
    if len(shape) < 2 or name.endswith(".mlp.gate.weight"):
        return types.F32
    if kind is GgufType.Q8_0 and shape[-1] % _Q8_BLOCK:
        return types.F16
    return types[kind.name]


def _rows(reader: AprReader, name: str, model: TransformerConfig) -> npt.NDArray[np.float32]:
    form, values = model.family.definition.gguf, reader.float32(name)
    if shift := norm_shift(name, form):
        return values + np.float32(shift)
    if not form.permuted or rotary_projection(name) is None:
        return values
    return np.ascontiguousarray(adjacent_pairs(values, model.head_dim))
