"""APR to GGUF: names and row order as llama.cpp wants them, weights as F32, F16 or Q8_0."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.atomic_files import atomic_path
from apr_dist.errors import ArchitectureRefused, UnsupportedModelFile
from apr_dist.gates.architecture import HEAD
from apr_dist.gates.model_file import prove_model
from apr_dist.interop.convert import Progress
from apr_dist.interop.gguf_file import load_gguf_package
from apr_dist.interop.gguf_names import PERMUTED_ARCHITECTURES, adjacent_pairs, rotary_projection, to_gguf
from apr_dist.interop.gguf_tokenizer import GgufTokenizer, gguf_tokenizer
from apr_dist.interop.hf_export import ExportSummary


class GgufType(StrEnum):
    """How the matrices of an exported GGUF are stored; vectors are always F32."""

    F32 = "f32"
    F16 = "f16"
    Q8_0 = "q8_0"


_FILE_TYPES = {GgufType.F32: "ALL_F32", GgufType.F16: "MOSTLY_F16", GgufType.Q8_0: "MOSTLY_Q8_0"}
_ARCHITECTURES: Final = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_Q8_BLOCK = 32
_DIMENSIONS: Final = {
    "block_count": "num_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_heads",
    "attention.head_count_kv": "num_kv_heads",
    "vocab_size": "vocab_size",
}


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
        source: APR file of a llama, mistral, qwen2 or qwen3 model.
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
        config = prove_model(reader).config
        architecture = _ARCHITECTURES[config.family]
        names = _names(reader, tied=config.tie_word_embeddings)
        tokenizer = gguf_tokenizer(reader.metadata, rows=_dimension(reader, "vocab_size"), where=reader.path)
        with atomic_path(Path(target), overwrite=overwrite) as path:
            writer = gguf.GGUFWriter(path, architecture)
            try:
                _add_fields(writer, reader, architecture, gguf.LlamaFileType[_FILE_TYPES[kind]])
                if tokenizer is not None:
                    _add_tokenizer(writer, tokenizer, reader.metadata)
                types = _write_tensors(writer, reader, names, architecture, kind, progress)
            finally:
                writer.close()
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


def _names(reader: AprReader, *, tied: bool) -> dict[str, str]:
    """GGUF names by Hugging Face name, in index order; a tied head is left out."""
    names: dict[str, str] = {}
    for name in reader.tensors:
        if tied and name == HEAD:
            continue
        translated = to_gguf(name)
        if translated is None:
            raise UnsupportedModelFile(
                f"tensor {name!r} has no place in a GGUF file",
                where=reader.path,
                expected="the tensors of a plain decoder",
                remedy="export to a Hugging Face folder instead",
            )
        names[name] = translated
    return names


def _dimension(reader: AprReader, key: str) -> int:
    value = getattr(reader.metadata, key)
    if value is None:
        raise ArchitectureRefused(
            f"the metadata do not state {key}",
            where=reader.path,
            expected="every dimension of the model",
            remedy="import the model again from its source",
        )
    return int(value)


def _add_fields(writer: Any, reader: AprReader, architecture: str, file_type: int) -> None:
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
    writer.add_file_type(file_type)
    for key, ours in _DIMENSIONS.items():
        writer.add_uint32(f"{architecture}.{key}", _dimension(reader, ours))
    head_dim = metadata.head_dim or _dimension(reader, "hidden_size") // _dimension(reader, "num_heads")
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        writer.add_uint32(f"{architecture}.{key}", head_dim)
    for key, number in {
        "attention.layer_norm_rms_epsilon": metadata.rms_norm_eps,
        "rope.freq_base": metadata.rope_theta,
    }.items():
        if number is None:
            raise ArchitectureRefused(f"the metadata do not state {key}", where=reader.path)
        writer.add_float32(f"{architecture}.{key}", number)
    _add_rope_scaling(writer, metadata.custom.get("rope_scaling"), architecture, reader.path)


def _add_rope_scaling(writer: Any, scaling: Any, architecture: str, where: Path) -> None:
    if not scaling:
        return
    kind = scaling.get("rope_type") if isinstance(scaling, Mapping) else scaling
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelFile(
            f"the rotary scaling {kind!r} is not written to GGUF",
            where=where,
            expected="none, linear or yarn",
            remedy="export to a Hugging Face folder instead",
        )
    prefix = f"{architecture}.rope.scaling"
    writer.add_string(f"{prefix}.type", kind)
    writer.add_float32(f"{prefix}.factor", float(scaling["factor"]))
    if scaling.get("original_max_position_embeddings"):
        writer.add_uint32(f"{prefix}.original_context_length", scaling["original_max_position_embeddings"])


def _add_tokenizer(writer: Any, tokenizer: GgufTokenizer, metadata: AprMetadata) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    writer.add_token_merges(tokenizer.merges)
    writer.add_add_space_prefix(False)
    for key, index in tokenizer.special_ids.items():
        writer.add_uint32(f"tokenizer.ggml.{key}", index)
    if metadata.chat_template:
        writer.add_chat_template(metadata.chat_template)


def _write_tensors(
    writer: Any,
    reader: AprReader,
    names: Mapping[str, str],
    architecture: str,
    kind: GgufType,
    progress: Progress | None,
) -> dict[str, int]:
    gguf = load_gguf_package()
    types = {name: _type_of(reader.tensors[name].shape, kind, gguf) for name in names}
    total = 0
    for name, translated in names.items():
        shape = reader.tensors[name].shape
        values, size = gguf.GGML_QUANT_SIZES[types[name]]
        n_bytes = reader.tensors[name].num_elements // values * size
        writer.add_tensor_info(translated, shape, np.dtype(np.float32), n_bytes, raw_dtype=types[name])
        total += n_bytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done = 0
    for name in names:
        stored = gguf.quantize(_rows(reader, name, architecture), types[name])
        writer.write_tensor_data(stored)
        reader.forget(name)
        done += stored.nbytes
        if progress:
            progress(done, total)
    return dict(Counter(kind.name for kind in types.values()).most_common())


def _type_of(shape: tuple[int, ...], kind: GgufType, gguf: Any) -> Any:
    """Vectors F32; matrices as asked, or F16 where a row is no multiple of Q8_0's block."""
    types = gguf.GGMLQuantizationType
    if len(shape) < 2:
        return types.F32
    if kind is GgufType.Q8_0 and shape[-1] % _Q8_BLOCK:
        return types.F16
    return types[kind.name]


def _rows(reader: AprReader, name: str, architecture: str) -> npt.NDArray[np.float32]:
    values = reader.float32(name)
    projection = rotary_projection(name)
    if architecture not in PERMUTED_ARCHITECTURES or projection is None:
        return values
    heads = _dimension(reader, "num_heads" if projection == "q" else "num_kv_heads")
    return np.ascontiguousarray(adjacent_pairs(values, values.shape[0] // heads))
