"""Any supported source to APR: what it is decides which importer runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from apr_dist.apr import legacy
from apr_dist.apr.files import open_regular
from apr_dist.apr.layout import MAGIC, DType
from apr_dist.data.manifest import TokenizerIdentity
from apr_dist.errors import NotAModelFile, OutputError, TokenizerError, UsageError
from apr_dist.interop import gguf_file
from apr_dist.interop.apr_import import import_apr
from apr_dist.interop.convert import ImportSummary, Progress
from apr_dist.interop.gguf import import_gguf
from apr_dist.interop.huggingface import import_huggingface
from apr_dist.interop.legacy import import_apr1
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

    Args:
        source: Hugging Face folder, safetensors file with ``config.json`` beside it, GGUF file,
            APR v2 file, manifest of APR shards (or their folder), or an "APR1" file.
        target: APR file to make.
        dtype: element type of every tensor; None keeps the source's, and F16 for what was quantised.
        tie: whether the head is the embedding; None decides from the source.
        overwrite: whether ``target`` may exist.
        progress: told how far the writing is.

    Raises:
        ModelFileError: the source is missing, damaged, or not supported.
        GateRefused: training would refuse the model; nothing is written.
        UsageError: an option that this kind of source does not have.
        OutputError: the target cannot be written.
    """
    manifest = find_manifest(Path(source)) if Path(source).is_dir() else None
    if Path(source).is_dir() and manifest is None:
        return import_huggingface(
            source, target, dtype=dtype, tie=tie, overwrite=overwrite, progress=progress
        )
    head = _head(manifest or Path(source))
    if head[:4] == gguf_file.MAGIC:
        return import_gguf(source, target, dtype=dtype, tie=tie, overwrite=overwrite, progress=progress)
    if head[:4] == MAGIC:
        return import_apr(source, target, dtype=dtype, tie=tie, overwrite=overwrite, progress=progress)
    if head[:4] == legacy.MAGIC or head[:1] == b"{":
        if dtype is not None or tie is not None:
            raise UsageError(
                "shards and APR v1 are joined as they are", where=source, expected="no --dtype and no --tie"
            )
        if head[:1] == b"{":
            return import_sharded(manifest or Path(source), target, overwrite=overwrite, progress=progress)
        return import_apr1(source, target, overwrite=overwrite, progress=progress)
    if head[8:9] == b"{":
        return import_huggingface(
            source, target, dtype=dtype, tie=tie, overwrite=overwrite, progress=progress
        )
    raise NotAModelFile(
        f"the file begins with {head[:4]!r}" if head else "the file is empty",
        where=source,
        expected="a GGUF, safetensors or APR file, a manifest of APR shards, or a Hugging Face folder",
        remedy="check the path",
    )


def import_with_tokenizer(
    source: Path,
    target: Path,
    *,
    dtype: DType | None = None,
    tie: bool | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[ImportSummary, Path, TokenizerIdentity | TokenizerError]:
    """As ``import_model``, and the tokenizer in a folder beside it: ``model.tokenizer`` for ``model.apr``.

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
    summary = import_model(source, model, dtype=dtype, tie=tie, overwrite=overwrite, progress=progress)
    try:
        return summary, folder, import_any_tokenizer(model, folder, overwrite=overwrite)
    except TokenizerError as missing:
        return summary, folder, missing
    except BaseException:  # interrupted, or the disk is full: the two belong together
        for path in new:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise


def _head(path: Path) -> bytes:
    descriptor = open_regular(path)
    try:
        return os.read(descriptor, 9)
    finally:
        os.close(descriptor)
