"""Verbs over model files."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import tyro

from apr_dist.apr.layout import DType
from apr_dist.cli.progress import bytes_bar
from apr_dist.errors import UsageError

Source = Annotated[Path, tyro.conf.Positional]
Output = Annotated[Path, tyro.conf.arg(aliases=["-o"])]


class ElementType(StrEnum):
    """Element types that can be written."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"


def import_model(
    source: Source,
    /,
    *,
    output: Output,
    dtype: ElementType | None = None,
    tie: bool = False,
    force: bool = False,
) -> None:
    """Make an APR file of another format's model, with its tokenizer beside it.

    The tokenizer goes to a folder named like the model: model.apr and model.tokenizer.

    Example: apr-dist import model.gguf -o model.apr

    Args:
        source: GGUF file.
        output: APR file to write.
        dtype: element type to write; by default the source's, and f16 for what was quantised.
        tie: drop a separate output head and use the embedding.
        force: replace an existing output.
    """
    from apr_dist.interop.gguf import import_gguf  # noqa: PLC0415
    from apr_dist.interop.tokenizers import import_any_tokenizer  # noqa: PLC0415

    if source.suffix.lower() != ".gguf":
        raise UsageError(f"the source ends in {source.suffix!r}", where=source, expected="a .gguf file")
    with bytes_bar(f"importing {source.name}") as progress:
        summary = import_gguf(
            source,
            output,
            dtype=DType[dtype.name] if dtype else None,
            tie=True if tie else None,
            overwrite=force,
            progress=progress,
        )
    folder = output.with_suffix(".tokenizer")
    identity = import_any_tokenizer(source, folder, overwrite=force)
    head = "tied" if summary.tied else "own"
    print(
        f"{output}: {summary.tensor_count} tensors, {summary.param_count:,} parameters, {head} output head,"
        f" {summary.size_bytes / 1e6:,.1f} MB"
    )
    print(f"{folder}: {identity.effective_vocab_count:,} tokens, {identity.merges_count:,} merges")
    for note in summary.notes:
        print(f"note: {note}")
