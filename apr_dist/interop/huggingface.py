"""A Hugging Face model folder, or a single safetensors file with its config, to APR."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from apr_dist.apr.bounded_json import parse_object
from apr_dist.apr.files import MISSING, map_readonly
from apr_dist.apr.layout import DType
from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.reader import NUMPY_TYPES, widen_bfloat16
from apr_dist.apr.writer import TensorSpec
from apr_dist.errors import DamagedModelFile, ModelFileMissing, TokenizerError, UnsupportedModelFile
from apr_dist.gates.architecture import HEAD
from apr_dist.interop.convert import CHUNK_ELEMENTS, COPY_BYTES, Piece, encode
from apr_dist.interop.embedding import END_IDS_KEY, embed_tokenizer, tokens_by_id
from apr_dist.interop.hf_config import metadata_from_config, read_config
from apr_dist.interop.joined import Rows, where_stored
from apr_dist.interop.request import ImportRequest, ImportSummary
from apr_dist.interop.safetensors_file import SafetensorsFile, StoredTensor
from apr_dist.interop.stored_names import CLAIM, model_tensors
from apr_dist.model.config import TransformerConfig
from apr_dist.model.families import Family
from apr_dist.parsing import parse_yaml

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


@dataclass(frozen=True)
class _Stored:
    """A tensor and the file that holds it."""

    file: SafetensorsFile
    tensor: StoredTensor

    def pieces(self, dtype: DType) -> Iterator[Piece]:
        """Its elements in a type, in order, a piece at a time."""
        own = self.tensor.dtype
        if own is dtype:
            yield from self.file.pieces(self.tensor, COPY_BYTES)
            return
        numbers = NUMPY_TYPES[own]
        for piece in self.file.pieces(self.tensor, CHUNK_ELEMENTS * numbers.itemsize):
            values: npt.NDArray[Any] = np.frombuffer(piece, numbers)
            wide = widen_bfloat16(values) if own is DType.BF16 else values.astype(np.float32)
            yield encode(wide, dtype, name=self.tensor.name, where=self.file.path)

    def part(self, name: str, rows: Rows) -> _Stored:
        """Some of its rows, as a tensor of their own."""
        whole = self.tensor
        row_bytes = whole.size_bytes // whole.shape[0]
        part = replace(
            whole,
            name=name,
            shape=(rows.count, *whole.shape[1:]),
            start=whole.start + rows.first * row_bytes,
            size_bytes=rows.count * row_bytes,
        )
        return _Stored(self.file, part)

    def float32(self) -> npt.NDArray[np.float32]:
        """All of its values, flat."""
        return np.concatenate([np.frombuffer(piece, np.float32) for piece in self.pieces(DType.F32)])


def import_huggingface(request: ImportRequest) -> ImportSummary:
    """Write the model of a Hugging Face folder as an APR file, its tokenizer inside.

    The source is a folder with ``config.json`` and one or many safetensors, or one ``.safetensors`` file with
    ``config.json`` beside it. Where neither configuration nor ``tie`` says so, the head is what it is in
    ``transformers``, which for most families is not the embedding.

    Raises:
        ModelFileError: the source is missing, damaged, or something in it is not supported.
        ArchitectureRefused: the configuration and the tensors disagree about the head.
        OutputError: the target cannot be written.
    """
    folder, weights, located = _locate(request.source)
    config = read_config(folder / "config.json")
    values, noted = metadata_from_config(config, where=folder / "config.json")
    with ExitStack() as stack:
        files = [stack.enter_context(SafetensorsFile(path)) for path in weights]
        stored = _all_tensors(files, refuse_f64=request.dtype is None)
        names, notes = model_tensors(
            stored,
            rope_theta=values["rope_theta"],
            values=lambda name: stored[name].float32(),
            claimed=config.get(CLAIM, Family(values["architecture"]).definition.hf_defaults[CLAIM]),
            asked=request.tie,
            equal=lambda left, right: _same_bytes(stored[left], stored[right]),
            where=folder,
        )
        held = _parts({name: stored[old] for name, old in names.items()}, values, folder)
        metadata, more = _metadata(folder, config, values | {CLAIM: HEAD not in held})
        specs = [
            TensorSpec(name, one.tensor.dtype if request.dtype is None else request.dtype, one.tensor.shape)
            for name, one in held.items()
        ]
        return request.write(
            ((spec.name, piece) for spec in specs for piece in held[spec.name].pieces(spec.dtype)),
            metadata=metadata,
            specs=specs,
            original_format="safetensors",
            notes=(*located, *notes, *noted, *more),
        )


def _parts(held: dict[str, _Stored], values: Mapping[str, Any], folder: Path) -> dict[str, _Stored]:
    """Each tensor of ours, one that the folder joins with others taken out of them."""
    family = Family(values["architecture"])
    if not family.definition.joined:
        return held
    model = TransformerConfig.from_metadata(
        values, family=family, where=folder, tie_word_embeddings=HEAD not in held
    )
    shapes = {name: one.tensor.shape for name, one in held.items()}
    rows = where_stored(model, shapes, where=folder)
    return {name: held[name] if of is None else held[of.stored].part(name, of) for name, of in rows.items()}


def _locate(source: Path) -> tuple[Path, list[Path], tuple[str, ...]]:
    """The folder with ``config.json``, the weight files in order, and a note on those that are not read.

    As in ``transformers``, a single file is read and the shards beside it are not.
    """
    if source.is_file():
        return source.parent, [source], ()
    index, single = source / _INDEX, source / _SINGLE
    if single.is_file():
        ignored = f"{_SINGLE} was read, and {_INDEX} beside it was not, as transformers does"
        return source, [single], (ignored,) if index.is_file() else ()
    if index.is_file():
        return source, [source / name for name in _shard_names(index)], ()
    pickled = sorted(path.name for path in source.glob("*.bin")) if source.is_dir() else []
    raise ModelFileMissing(
        f"the folder holds {pickled[0]} but no safetensors" if pickled else "there is no model here",
        where=source,
        expected=f"a folder with config.json and {_SINGLE} or {_INDEX}, or a .safetensors file",
        remedy="save the model as safetensors" if pickled else "check the path",
        falsifier=MISSING,
    )


def _shard_names(index: Path) -> list[str]:
    try:
        names = set(parse_object(bytes(map_readonly(index)))["weight_map"].values())
        plain = all(Path(name).name == name and name.endswith(".safetensors") for name in names)
    except (ValueError, KeyError, AttributeError, TypeError):
        plain = False
    if not plain or not names:
        raise DamagedModelFile(
            "the shard index cannot be read",
            where=index,
            expected="a weight_map of tensor names to .safetensors files in the same folder",
            remedy="copy or download it again",
        )
    return sorted(names)


def _all_tensors(files: list[SafetensorsFile], *, refuse_f64: bool) -> dict[str, _Stored]:
    found: dict[str, _Stored] = {}
    for file in files:
        for tensor in file.tensors.values():
            if tensor.name in found:
                raise DamagedModelFile(
                    f"tensor {tensor.name!r} is also in {found[tensor.name].file.path.name}",
                    where=file.path,
                    expected="each tensor in one file",
                    remedy="remove the files that do not belong to the model",
                )
            if tensor.dtype is DType.F64 and refuse_f64:
                raise UnsupportedModelFile(
                    f"tensor {tensor.name!r} is F64",
                    where=file.path,
                    expected="F32, F16 or BF16",
                    remedy="choose one with --dtype",
                )
            found[tensor.name] = _Stored(file, tensor)
    return found


def _same_bytes(left: _Stored, right: _Stored) -> bool:
    if (left.tensor.dtype, left.tensor.shape) != (right.tensor.dtype, right.tensor.shape):
        return False
    pairs = zip(
        left.file.pieces(left.tensor, COPY_BYTES), right.file.pieces(right.tensor, COPY_BYTES), strict=True
    )
    return all(np.array_equal(np.asarray(one), np.asarray(other)) for one, other in pairs)


def _metadata(
    folder: Path, config: Mapping[str, Any], values: dict[str, Any]
) -> tuple[AprMetadata, tuple[str, ...]]:
    special, template = _special_tokens(folder, config)
    values |= _front_matter(folder)
    values |= {
        "name": folder.resolve().name,
        "source": config.get("_name_or_path") or folder.resolve().name,
        "original_format": "safetensors",
    }
    if ends := _end_ids(folder, config):
        values[END_IDS_KEY] = ends
    if special:
        values["special_tokens"] = special
    if template:
        values["chat_template"] = template
        if "<|im_start|>" in template:
            values["chat_format"] = "chatml"
    metadata = AprMetadata.from_mapping(values)
    try:
        return embed_tokenizer(metadata, folder)
    except TokenizerError as error:
        return metadata, (f"the tokenizer was not embedded: {error}",)


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    """Special tokens by role, from the first file that names one, and the chat template."""
    stated = _optional(folder / "tokenizer_config.json")
    older = _optional(folder / "special_tokens_map.json")
    special: dict[str, str] = {}
    for role in _SPECIAL_TOKENS:
        for source in (stated, older):
            token = source.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                special.setdefault(role, token)
    unnamed = {role: config.get(f"{role}_id") for role in _SPECIAL_TOKENS if role not in special}
    unnamed = {role: _first(ids) for role, ids in unnamed.items() if _first(ids) is not None}
    if unnamed:
        tokens = tokens_by_id(folder)
        special |= {role: tokens[one] for role, one in unnamed.items() if one in tokens}
    template = stated.get("chat_template")
    if isinstance(template, list):  # several by name; the one called default speaks
        template = next((one.get("template") for one in template if one.get("name") == "default"), None)
    separate = folder / "chat_template.jinja"
    if separate.is_file():
        template = bytes(map_readonly(separate)).decode(errors="replace")
    return special, template if isinstance(template, str) else None


def _first(ids: Any) -> Any:
    return ids[0] if isinstance(ids, list) and ids else ids


def _end_ids(folder: Path, config: Mapping[str, Any]) -> list[int]:
    """Where generation stops: as the generation configuration states it, else the model's."""
    generation = _optional(folder / "generation_config.json")
    ids = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = ids if isinstance(ids, list) else [ids]
    return [one for one in ids if type(one) is int and one >= 0]


def _optional(path: Path) -> dict[str, Any]:
    return read_config(path) if path.is_file() else {}


def _front_matter(folder: Path) -> dict[str, str]:
    """License and data sets from the front matter of the folder's model card."""
    card = folder / "README.md"
    match = (
        _FRONT_MATTER.match(bytes(map_readonly(card)).decode(errors="replace")) if card.is_file() else None
    )
    if match is None:
        return {}
    try:
        facts = parse_yaml(match[1])
    except ValueError:
        return {}  # a broken card says nothing about the weights
    facts = facts if isinstance(facts, dict) else {}
    found: dict[str, str] = {}
    if isinstance(facts.get("license"), str):
        found["license"] = facts["license"]
    sets = facts.get("datasets")
    if isinstance(sets, list) and sets and all(isinstance(name, str) for name in sets):
        found["data_source"] = ", ".join(sets)
    return found
