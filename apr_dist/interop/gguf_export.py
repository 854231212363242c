"""APR to GGUF: names and row order as llama.cpp wants them, weights as F32, F16 or Q8_0.

A file takes its name only after it was read back and says what the source says (``gguf_check``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from apr_dist.apr.reader import AprReader
from apr_dist.atomic_files import atomic_path
from apr_dist.errors import UnsupportedModelFile
from apr_dist.gates.model_file import prove_model
from apr_dist.interop.chat_settings import gguf_sampling, stated_template
from apr_dist.interop.convert import Progress, counted
from apr_dist.interop.gguf_check import Stored, check_read_back, refuse_too_large
from apr_dist.interop.gguf_file import load_gguf_package
from apr_dist.interop.gguf_metadata import WINDOW, WINDOW_PATTERN, query_scalar
from apr_dist.interop.gguf_names import adjacent_pairs, norm_shift, rotary_projection, to_gguf
from apr_dist.interop.gguf_rope import rope_fields, rope_tensors
from apr_dist.interop.gguf_tokenizer import GgufTokenizer, gguf_tokenizer
from apr_dist.interop.hf_export import ExportSummary
from apr_dist.interop.joined import joined_shape, stored_tensors
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
        tensor_count=len(names),
        size_bytes=Path(target).stat().st_size,
        dtypes=types,
        files=(Path(target).name,),
        notes=() if tokenizer else ("no tokenizer is embedded in the file: none was written",),
    )


def _refuse_unsayable(model: TransformerConfig, where: Path) -> None:
    """Refuse what llama.cpp would compute differently because a GGUF file has no word for it."""
    what = [*_odd_layers(model), *_odd_sizes(model), *_odd_rotation(model)]
    if what:
        raise UnsupportedModelFile(
            f"a GGUF file cannot state {', and not '.join(what)}",
            where=where,
            expected="a model that llama.cpp computes as it is",
            remedy="export to a Hugging Face folder instead",
        )


def _odd_layers(model: TransformerConfig) -> Iterator[str]:
    """Windows, and layers without rotation, that llama.cpp does not have."""
    facts, window = model.family.definition, model.sliding_window
    if not facts.gguf.exported:
        yield f"the blocks of {model.family}"
    if facts.full_every is None and window is not None and window < model.max_position_embeddings:
        yield f"its window of {window} tokens"
    if facts.full_every is not None and model.layer_types != _kinds_read(model, facts.full_every):
        yield "which of its layers have a window"
    if facts.gguf.stated_by is not None and not any(model.windows):
        yield "that none of its layers has a window"
    if facts.no_rope_every is not None and model.no_rope_layers != rope_layers(
        model.num_layers, facts.no_rope_every
    ):
        yield "which of its layers rotate nothing"


def _odd_sizes(model: TransformerConfig) -> Iterator[str]:
    """Heads, and scores, of other sizes than llama.cpp takes."""
    form = model.family.definition.gguf
    if form.even_heads and model.query_size != model.hidden_size:
        yield f"heads of {model.head_dim} dimensions, which are not hidden size over heads"
    if form.own_head and model.tie_word_embeddings:
        yield "a head that is the embedding"
    scalar = query_scalar(form, model.num_layers, vars(model))
    if model.query_pre_attn_scalar not in (None, scalar):
        yield f"query_pre_attn_scalar {model.query_pre_attn_scalar:g} (llama.cpp computes with {scalar})"


def _odd_rotation(model: TransformerConfig) -> Iterator[str]:
    """Scalings that the architecture is not read with."""
    scaling, form = model.rope_scaling, model.family.definition.gguf
    sayable = {
        RopeScalingType.LLAMA3: form.rope_factors,
        RopeScalingType.LONGROPE: form.long_factors,
        RopeScalingType.DYNAMIC: False,
    }
    if scaling is not None and not sayable.get(scaling.rope_type, True):
        yield f"the rotary scaling {scaling.rope_type.value} of a {model.family} model"
    if form.stated_by is not None and model.rope_local_theta not in (None, model.rope_theta):
        yield "a RoPE base of its own for layers with a window"


def _kinds_read(model: TransformerConfig, full_every: int) -> tuple[str, ...]:
    """The kinds of layers that llama.cpp gives the model."""
    return layer_kinds(model.num_layers, full_every if any(model.windows) else 1)


def _names(reader: AprReader, model: TransformerConfig, form: GgufForm) -> dict[str, Stored]:
    """What is written by its Hugging Face name, in index order; a tied head is left out."""
    names: dict[str, Stored] = {}
    order = {name: number for number, name in enumerate(reader.tensors)}
    for name, parts in sorted(stored_tensors(model).items(), key=lambda item: order[item[1][0]]):
        translated = to_gguf(name, form)
        if translated is None:
            raise UnsupportedModelFile(
                f"tensor {name!r} has no place in a GGUF file",
                where=reader.path,
                expected="the tensors of a plain decoder",
                remedy="export to a Hugging Face folder instead",
            )
        names[name] = Stored(translated, parts)
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
    values: dict[str, str | int | float | list[bool]] = {
        **_stated(model),
        "vocab_size": model.vocab_size,
        "attention.value_length": model.head_dim,
        "rope.dimension_count": model.rotary_dim,
        "rope.freq_base": float(model.rope_theta),
        **rope_fields(model.rope_scaling, model.family.definition.gguf, reader.path),
    }
    adders = {
        str: writer.add_string,
        int: writer.add_uint32,
        float: writer.add_float32,
        list: writer.add_array,
    }
    for key, value in values.items():
        add = adders[type(value)]
        add(f"{architecture}.{key}", value)


def _stated(model: TransformerConfig) -> dict[str, Any]:
    """Fields of the model by their keys, the family's own over those that all have."""
    keys = {**GGUF_KEYS, **model.family.definition.gguf.keys}
    values = {key: getattr(model, rule.ours) for key, rule in keys.items() if rule.ours is not None}
    if not any(model.windows):  # zero is what tells Phi-4 from Phi-3 for older releases of llama.cpp
        all_alike = model.family.definition.full_every is None
        values |= {WINDOW: 0 if all_alike and WINDOW in values else None}
    elif WINDOW_PATTERN in keys:
        values[WINDOW_PATTERN] = [window is not None for window in model.windows]
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
    names: Mapping[str, Stored],
    model: TransformerConfig,
    kind: GgufType,
    progress: Progress | None,
) -> dict[str, int]:
    gguf = load_gguf_package()
    shapes = {
        name: joined_shape([reader.tensors[part].shape for part in one.parts]) for name, one in names.items()
    }
    types = {name: _type_of(shape, kind, gguf) for name, shape in shapes.items()}
    computed = rope_tensors(model.rope_scaling, theta=model.rope_theta, head_dim=model.rotary_dim)
    total = 0
    for name, factors in computed.items():
        writer.add_tensor_info(name, factors.shape, factors.dtype, factors.nbytes)
    for name, one in names.items():
        values, size = gguf.GGML_QUANT_SIZES[types[name]]
        n_bytes = math.prod(shapes[name]) // values * size
        writer.add_tensor_info(one.gguf, shapes[name], np.dtype(np.float32), n_bytes, raw_dtype=types[name])
        total += n_bytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for factors in computed.values():
        writer.write_tensor_data(factors)
    report = counted(progress, total)
    for name, one in names.items():
        pieces = [_rows(reader, part, model) for part in one.parts]
        rows = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        refuse_too_large(rows, types[name].name, name=name, where=reader.path)
        stored = gguf.quantize(rows, types[name])
        writer.write_tensor_data(stored)
        for part in one.parts:
            reader.forget(part)
        report(stored.nbytes)
    return dict(Counter(kind.name for kind in types.values()).most_common())


def _type_of(shape: tuple[int, ...], kind: GgufType, gguf: Any) -> Any:
    """Vectors F32; matrices as asked, or F16 where a row is no multiple of Q8_0's block."""
    types = gguf.GGMLQuantizationType
    if len(shape) < 2:
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
