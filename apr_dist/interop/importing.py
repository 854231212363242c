"""Any supported source to APR: what it is decides which importer runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from apr_dist.apr import legacy
from apr_dist.apr.files import open_regular
from apr_dist.apr.layout import MAGIC, DType
from apr_dist.apr.reader import AprReader
from apr_dist.atomic_files import temporary_beside
from apr_dist.data.manifest import TokenizerIdentity
from apr_dist.errors import NotAModelFile, OutputError, TokenizerError, UsageError
from apr_dist.interop import gguf_file
from apr_dist.interop.apr_import import import_apr
from apr_dist.interop.convert import Progress
from apr_dist.interop.gguf import import_gguf
from apr_dist.interop.huggingface import import_huggingface
from apr_dist.interop.legacy import import_apr1
from apr_dist.interop.new_tokens import add_tokens
from apr_dist.interop.request import ImportRequest, ImportSummary
from apr_dist.interop.sharded import find_manifest, import_sharded
from apr_dist.interop.tokenizers import import_any_tokenizer


def import_model(
    source: Path,
    target: Path,
    *,
    dtype: DType | None = None,
    tie: bool | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ImportSummary:
    """Write the model at ``source`` as an APR file, its tokenizer inside.

    The source is a Hugging Face folder, a safetensors file with ``config.json`` beside it, a GGUF file, an
    APR v2 file, a manifest of APR shards (or their folder), or an "APR1" file. The other arguments are those
    of ``ImportRequest``.

    Raises:
        ModelFileError: the source is missing, damaged, or not supported.
        GateRefused: training would refuse the model; nothing is written.
        UsageError: an option that this kind of source does not have.
        OutputError: the target cannot be written.
    """
    request = ImportRequest(
        source=Path(source),
        target=Path(target),
        dtype=dtype,
        tie=tie,
        overwrite=overwrite,
        progress=progress,
    )
    if request.source.is_dir():
        manifest = find_manifest(request.source)
        if manifest is None:
            return import_huggingface(request)
        request = replace(request, source=manifest)
    head = _head(request.source)
    if head[:4] == gguf_file.MAGIC:
        return import_gguf(request)
    if head[:4] == MAGIC:
        return import_apr(request)
    if head[:4] == legacy.MAGIC or head[:1] == b"{":
        if dtype is not None or tie is not None:
            raise UsageError(
                "shards and APR v1 are joined as they are", where=source, expected="no --dtype and no --tie"
            )
        return import_sharded(request) if head[:1] == b"{" else import_apr1(request)
    if head[8:9] == b"{":
        return import_huggingface(request)
    raise NotAModelFile(
        f"the file begins with {head[:4]!r}" if head else "the file is empty",
        where=source,
        expected="a GGUF, safetensors or APR file, a manifest of APR shards, or a Hugging Face folder",
        remedy="check the path",
    )


def import_with_tokenizer(
    source: Path, target: Path, *, overwrite: bool = False, new_tokens: Sequence[str] = (), **options: Any
) -> tuple[ImportSummary, Path, TokenizerIdentity | TokenizerError]:
    """As ``import_model``, and the tokenizer in a folder beside it: ``model.tokenizer`` for ``model.apr``.

    ``new_tokens`` are added to both (`new_tokens.add_tokens`).

    Returns:
        The summary, the folder, and the tokenizer in it, or why there is none.

    Raises:
        ModelFileError, UsageError: as ``import_model``.
        OutputError: model or folder cannot be written; neither is left half-done.
    """
    model, folder = Path(target), Path(target).parent / f"{Path(target).stem}.tokenizer"
    new = [path for path in (model, folder) if not os.path.lexists(path)]
    if folder not in new and not overwrite:
        raise OutputError("already exists", where=folder, remedy="pass --force to replace it")
    if new_tokens:
        summary = _import_and_add(source, model, new_tokens, overwrite=overwrite, **options)
    else:
        summary = import_model(source, model, overwrite=overwrite, **options)
    try:
        return summary, folder, import_any_tokenizer(model, folder, overwrite=overwrite)
    except TokenizerError as missing:
        return summary, folder, missing
    except BaseException:  # interrupted, or the disk is full: the two belong together
        for path in new:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise


def _import_and_add(
    source: Path, target: Path, tokens: Sequence[str], *, overwrite: bool, **options: Any
) -> ImportSummary:
    """Import to a file beside the target, and write the target from it with the tokens added."""
    if os.path.lexists(target) and not overwrite:
        raise OutputError("already exists", where=target, remedy="pass --force to replace it")
    plain = temporary_beside(target)
    try:
        summary = import_model(source, plain, overwrite=True, **options)
        added = add_tokens(plain, target, tokens, overwrite=overwrite)
    finally:
        plain.unlink(missing_ok=True)
    with AprReader(target, verify="structure") as reader:
        parameters = sum(entry.num_elements for entry in reader.tensors.values())
    ids = ",".join(map(str, added.ids))
    before, after = added.rows
    rows = f"the {before:,} rows are {after:,} now" if after > before else "they take rows held in reserve"
    note = f"{len(tokens)} tokens added: {rows}; train an adapter with --adapter.train-embeddings {ids}"
    return replace(
        summary,
        target=target,
        param_count=parameters,
        size_bytes=target.stat().st_size,
        notes=(*summary.notes, note),
    )


def _head(path: Path) -> bytes:
    descriptor = open_regular(path)
    try:
        return os.read(descriptor, 9)
    finally:
        os.close(descriptor)
