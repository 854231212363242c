"""APR to a Hugging Face folder, or to one safetensors file with its config."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from apr_dist.apr.layout import TOKENIZER_TEXT, DType, payload_bytes
from apr_dist.apr.reader import AprReader
from apr_dist.apr.writer import TensorSpec
from apr_dist.atomic_files import AtomicFile, flush_folder, temporary_beside, writing_to
from apr_dist.errors import OutputError
from apr_dist.gates.model_file import prove_model
from apr_dist.interop.chat_settings import huggingface_files
from apr_dist.interop.convert import Progress, converted_pieces, count_dtypes, counted, kept_type, total_bytes
from apr_dist.interop.embedding import embedded_files, stated_token_ids
from apr_dist.interop.hf_config import config_from_metadata, config_text, tokenizer_config
from apr_dist.interop.joined import joined_shape, joined_type, stored_tensors
from apr_dist.interop.model_card import model_card
from apr_dist.interop.safetensors_file import SafetensorsWriter
from apr_dist.model.config import TransformerConfig

MAX_SHARD_BYTES: Final = 5_000_000_000


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """What an export made.

    Attributes:
        source: the APR file that was read.
        target: file or folder that was written.
        format: ``"huggingface"``, ``"safetensors"`` or ``"gguf"``.
        tensor_count: tensors in the target.
        size_bytes: bytes of all files written.
        dtypes: tensors by element type.
        files: names of the files written, relative to the target's folder.
        notes: what was decided on the way and is worth telling, one sentence each.
    """

    source: Path
    target: Path
    format: str
    tensor_count: int
    size_bytes: int
    dtypes: dict[str, int]
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()


def export_huggingface(
    source: Path,
    target: Path,
    *,
    dtype: DType | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportSummary:
    """Write an APR file as a Hugging Face folder: config, weights, tokenizer, generation config, card.

    Args:
        source: APR file.
        target: folder to make; it appears complete or not at all.
        dtype: element type of every tensor; None keeps F32, F16 and BF16 and makes the rest F16.
        max_shard_bytes: size from which weights are split over several files.
        overwrite: whether a model folder at ``target`` may be replaced.
        progress: told how far the writing is.

    Raises:
        ModelFileError: the source cannot be read.
        ArchitectureRefused: the source does not say which model it is, or a config.json cannot say it.
        OutputError: the target exists or cannot be written.
    """
    with AprReader(source) as reader, _new_folder(Path(target), overwrite) as folder:
        model, specs = _specs(reader, dtype)
        parts = stored_tensors(model)
        shards = _split(specs, max_shard_bytes)
        report = counted(progress, total_bytes(specs))
        for name, shard in shards.items():
            _write_weights(reader, shard, parts, folder / name, report)
        texts = _texts(reader, specs, model) | embedded_files(reader.metadata, where=reader.path)
        texts = huggingface_files(reader.metadata, texts, where=reader.path)
        if len(shards) > 1:
            texts["model.safetensors.index.json"] = _index(shards)
        for name, content in texts.items():
            _write_text(folder / name, content)
        size = sum(path.stat().st_size for path in folder.iterdir())
        notes = () if TOKENIZER_TEXT in texts else ("no tokenizer is embedded in the file: none was written",)
    return ExportSummary(
        source=Path(source),
        target=Path(target),
        format="huggingface",
        tensor_count=len(specs),
        size_bytes=size,
        dtypes=count_dtypes(specs),
        files=tuple(sorted([*shards, *texts])),
        notes=notes,
    )


def export_safetensors(
    source: Path,
    target: Path,
    *,
    dtype: DType | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportSummary:
    """Write an APR file as one safetensors file, with ``config.json`` beside it.

    Arguments and errors are those of ``export_huggingface``.
    """
    target = Path(target)
    beside = target.with_name("config.json")
    with AprReader(source) as reader:
        model, specs = _specs(reader, dtype)
        config = _texts(reader, specs, model)["config.json"]
        with AtomicFile(beside, overwrite=overwrite) as file:
            file.write_at(0, config)
            report = counted(progress, total_bytes(specs))
            _write_weights(reader, specs, stored_tensors(model), target, report, overwrite=overwrite)
    return ExportSummary(
        source=Path(source),
        target=target,
        format="safetensors",
        tensor_count=len(specs),
        size_bytes=target.stat().st_size + len(config),
        dtypes=count_dtypes(specs),
        files=(target.name, beside.name),
    )


def _specs(reader: AprReader, dtype: DType | None) -> tuple[TransformerConfig, list[TensorSpec]]:
    """The model, and what to write of it in index order; a tied head is left out."""
    model = prove_model(reader).config
    order = {name: number for number, name in enumerate(reader.tensors)}
    stored = sorted(stored_tensors(model).items(), key=lambda item: order[item[1][0]])
    specs = []
    for name, parts in stored:
        entries = [reader.tensors[part] for part in parts]
        kind = joined_type([kept_type(entry, dtype) for entry in entries])
        specs.append(TensorSpec(name, kind, joined_shape([entry.shape for entry in entries])))
    return model, specs


def _split(specs: Sequence[TensorSpec], limit: int) -> dict[str, list[TensorSpec]]:
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        needed = payload_bytes(spec.dtype, spec.shape)
        if groups[-1] and size + needed > limit:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += needed
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _write_weights(
    reader: AprReader,
    specs: Sequence[TensorSpec],
    parts: Mapping[str, tuple[str, ...]],
    path: Path,
    report: Callable[[int], None],
    *,
    overwrite: bool = False,
) -> None:
    with SafetensorsWriter(path, specs, overwrite=overwrite) as writer:
        for spec in specs:
            for part in parts[spec.name]:
                for piece in converted_pieces(reader, part, spec.dtype):
                    writer.append(piece)
                    report(piece.nbytes)
                reader.forget(part)


def _texts(reader: AprReader, specs: Sequence[TensorSpec], model: TransformerConfig) -> dict[str, bytes]:
    weights = [spec.dtype for spec in specs if len(spec.shape) > 1] or [DType.F32]
    common = max(set(weights), key=weights.count)
    metadata = reader.metadata
    config = config_from_metadata(
        metadata, model, dtype=common, token_ids=stated_token_ids(metadata), where=reader.path
    )
    texts = {"config.json": config_text(config), "README.md": model_card(metadata).encode()}
    if TOKENIZER_TEXT in embedded_files(metadata, where=reader.path):
        texts["tokenizer_config.json"] = config_text(tokenizer_config(metadata))
    return texts


def _index(shards: dict[str, list[TensorSpec]]) -> bytes:
    specs = [spec for shard in shards.values() for spec in shard]
    weight_map = {spec.name: name for name, shard in shards.items() for spec in shard}
    index = {"metadata": {"total_size": total_bytes(specs)}, "weight_map": weight_map}
    return (json.dumps(index, indent=2) + "\n").encode()


def _write_text(path: Path, content: bytes) -> None:
    with AtomicFile(path) as file:
        file.write_at(0, content)


@contextlib.contextmanager
def _new_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place when the block ends well."""
    _refuse_existing(target, overwrite)
    work = temporary_beside(target)
    with writing_to(target):
        work.mkdir()
    try:
        yield work
        with writing_to(target):
            flush_folder(work)
            _take_place(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _refuse_existing(target: Path, overwrite: bool) -> None:
    empty = target.is_dir() and not any(target.iterdir())
    if not target.exists() or empty:
        return
    if overwrite and (target / "config.json").is_file():
        return
    raise OutputError(
        "the output exists already" + (" and is no model folder" if overwrite else ""),
        where=target,
        expected="a path where nothing is",
        remedy="choose another path" + ("" if overwrite else ", or pass --force to replace a model folder"),
    )


def _take_place(work: Path, target: Path) -> None:
    if not target.exists():
        work.rename(target)
    else:
        old = work.with_name(work.name + ".old")
        target.rename(old)
        try:
            work.rename(target)
        finally:
            if not target.exists():  # refused or interrupted between the two
                old.rename(target)
        shutil.rmtree(old)
    flush_folder(target.parent)
