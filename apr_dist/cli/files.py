"""Verbs over model files: import, export, inspect, validate, stamp, diff."""

from __future__ import annotations

import json as json_text
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import tyro

from apr_dist.apr.layout import DType
from apr_dist.cli.progress import bytes_bar
from apr_dist.cli.tables import inspection_lines
from apr_dist.errors import TokenizerError, UsageError
from apr_dist.interop.diff import diff_files
from apr_dist.interop.gguf_export import GgufType, export_gguf
from apr_dist.interop.hf_export import export_huggingface, export_safetensors
from apr_dist.interop.importing import import_with_tokenizer
from apr_dist.interop.inspection import inspect_file, validate_file
from apr_dist.interop.new_tokens import split_tokens
from apr_dist.interop.stamp import Changes, stamp_file
from apr_dist.report.verdict_table import table_lines

Source = Annotated[Path, tyro.conf.Positional]
Output = Annotated[Path, tyro.conf.arg(aliases=["-o"])]


class ElementType(StrEnum):
    """Element types that can be written; q8_0 to GGUF only."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"


class Format(StrEnum):
    """What a model can be exported to."""

    HUGGINGFACE = "huggingface"
    SAFETENSORS = "safetensors"
    GGUF = "gguf"


def import_file(
    source: Source,
    /,
    *,
    output: Output,
    dtype: ElementType | None = None,
    tie: bool = False,
    add_tokens: str | None = None,
    force: bool = False,
) -> None:
    """Make an APR file of a model in another format, its tokenizer inside and beside it.

    What training would refuse is refused here, in the same words. An APR file of another program is brought
    into the form that is trained here: plain tensor names, rows of q and k in split halves.

    The tokenizer folder beside the model is named like it: model.apr and model.tokenizer.

    Example: apr-dist import model.gguf -o model.apr

    Args:
        source: Hugging Face folder, safetensors file with config.json beside it, GGUF, APR file, manifest of
            APR shards or the folder with it, or old APR1 file.
        output: APR file to write.
        dtype: element type to write; by default the source's, and f16 for what was quantised.
        tie: drop a separate output head and use the embedding.
        add_tokens: special tokens to add to the vocabulary, by commas; their rows are the mean of the others.
        force: replace an existing output.
    """
    with bytes_bar(f"importing {source.name}") as progress:
        summary, folder, tokenizer = import_with_tokenizer(
            source,
            output,
            dtype=dtype_of(dtype),
            tie=True if tie else None,
            new_tokens=list(split_tokens(add_tokens)),
            overwrite=force,
            progress=progress,
        )
    head = "tied" if summary.tied else "own"
    print(
        f"{output}: {summary.tensor_count} tensors, {summary.param_count:,} parameters, {head} output head,"
        f" {summary.size_bytes / 1e6:,.1f} MB"
    )
    if isinstance(tokenizer, TokenizerError):
        print(f"warning: no tokenizer came with the model: {tokenizer}")
    else:
        print(f"{folder}: {tokenizer.effective_vocab_count:,} tokens, {tokenizer.merges_count:,} merges")
    for note in summary.notes:
        print(f"note: {note}")


def export_file(
    source: Source,
    /,
    *,
    to: Format,
    output: Output,
    dtype: ElementType | None = None,
    base: Path | None = None,
    fused_experts: bool = False,
    force: bool = False,
) -> None:
    """Write an APR file's model in another format, its tokenizer with it; or an adapter alone as GGUF.

    Example: apr-dist export model.apr --to huggingface -o model-hf

    Args:
        source: APR file.
        to: huggingface (a folder with config, weights, tokenizer and model card), safetensors, or gguf.
        output: folder or file to write.
        dtype: element type; by default the source's, and f16 for gguf.
        fused_experts: keep a block's experts in one tensor, for transformers 5; else each has its own.
        base: given, the source is an adapter (a folder, or checkpoint.apr of its run), and this its base.
        force: replace an existing output.
    """
    if base is not None:
        _export_adapter(source, base, to, output, dtype, force=force)
        return
    with bytes_bar(f"exporting {source.name}") as progress:
        if to is Format.GGUF:
            if dtype is ElementType.BF16:
                raise UsageError("gguf is not written as bf16", expected="f32, f16 or q8_0")
            kind = GgufType(dtype.value) if dtype else GgufType.F16
            summary = export_gguf(source, output, kind=kind, overwrite=force, progress=progress)
        else:
            write = export_huggingface if to is Format.HUGGINGFACE else export_safetensors
            summary = write(
                source,
                output,
                dtype=dtype_of(dtype),
                fused_experts=fused_experts,
                overwrite=force,
                progress=progress,
            )
    print(
        f"{output}: {summary.format}, {summary.tensor_count} tensors, {summary.size_bytes / 1e6:,.1f} MB in"
        f" {len(summary.files)} file(s)"
    )
    for note in summary.notes:
        print(f"note: {note}")


def _export_adapter(
    adapter: Path, base: Path, to: Format, output: Path, dtype: ElementType | None, *, force: bool
) -> None:
    if to is not Format.GGUF or dtype not in (None, ElementType.F32):
        raise UsageError(
            "an adapter alone is exported to gguf, in f32",
            where="--base",
            expected="--to gguf",
            remedy="give peft the folder adapter/ of the run; or merge it, and export what is merged",
        )
    from apr_dist.interop.gguf_adapter import export_adapter_gguf  # noqa: PLC0415

    summary = export_adapter_gguf(adapter, base, output, overwrite=force)
    print(f"{output}: gguf adapter, {summary.tensor_count} tensors, {summary.size_bytes / 1e6:,.1f} MB")


def inspect(path: Source, /, *, json: bool = False, tensors: bool = False, quality: bool = False) -> None:
    """Show what an APR file is: family, dimensions, element types, tie, tokenizer, provenance, checksum.

    Example: apr-dist inspect model.apr --quality

    Args:
        path: APR file.
        json: print JSON instead of a table.
        tensors: also list every tensor.
        quality: also scan the weights and score the file from 0 to 100.
    """
    with bytes_bar(f"inspecting {path.name}") as progress:
        report = inspect_file(path, quality=quality, progress=progress)
    if json:
        facts = report.to_json()
        if tensors:
            facts["tensors"] = [
                {"name": t.name, "dtype": t.dtype.name, "shape": list(t.shape), "bytes": t.size_bytes}
                for t in report.tensors
            ]
        print(json_text.dumps(facts, indent=2, ensure_ascii=False))
        return
    print("\n".join(inspection_lines(report, tensors=tensors)))


def validate(path: Source, /) -> None:
    """Prove that training would accept an APR file: the gates of a run, in its words.

    Every checksum; a decoder of one family, agreed by metadata and tensor names; every dimension stated;
    every tensor there, of the right shape, and none left over; every value finite, no matrix all zero.
    Whether the tokenizer and the data fit the model is checked by `apr-dist plan` and by the run itself.

    Example: apr-dist validate model.apr

    Args:
        path: APR file.
    """
    with bytes_bar(f"validating {path.name}") as progress:
        report = validate_file(path, progress=progress)
    for result in report.checks:
        print(f"ok: {result.gate}: {result.measured}")
    print(f"{path}: valid, {report.tensor_count} tensors, {report.size_bytes / 1e6:,.1f} MB")


def stamp(
    source: Source,
    /,
    *,
    output: Output,
    changes: Annotated[Changes, tyro.conf.arg(name="")] = Changes(),  # noqa: B008  (it is frozen)
    tokenizer: Path | None = None,
    chat_template: Path | None = None,
    force: bool = False,
) -> None:
    """Write an APR file again with other metadata; tensor bytes are copied as they are.

    A file that training would refuse even with the changes is not written.

    Example: apr-dist stamp m.apr --architecture qwen2 --hf-architecture Qwen2ForCausalLM -o stamped.apr

    Args:
        source: APR file.
        output: APR file to write.
        changes: the keys to change.
        tokenizer: folder whose tokenizer is put into the file.
        chat_template: Jinja file that becomes the model's chat template.
        force: replace an existing output.
    """
    with bytes_bar(f"stamping {source.name}") as progress:
        summary = stamp_file(
            source,
            output,
            changes=asdict(changes),
            tokenizer=tokenizer,
            chat_template=chat_template,
            overwrite=force,
            progress=progress,
        )
    for key, before, after in summary.changes:
        print(f"{key}: {before} -> {after}")
    if summary.tokenizer_embedded:
        print(f"tokenizer: embedded from {tokenizer}")
    for note in summary.notes:
        print(f"note: {note}")
    print(f"{output}: {summary.tensor_count} tensors copied, {summary.size_bytes / 1e6:,.1f} MB")


def diff(first: Source, second: Source, /) -> int:
    """Compare two whole APR files: metadata, and every tensor that differs; exits 1 when they do.

    Example: apr-dist diff before.apr after.apr

    Args:
        first: APR file.
        second: APR file.
    """
    with bytes_bar("comparing") as progress:
        found = diff_files(first, second, progress=progress)
    for key, before, after in found.metadata:
        print(f"metadata {key}: {before!r} -> {after!r}")
    for name in found.only_first:
        print(f"only in {first}: {name}")
    for name in found.only_second:
        print(f"only in {second}: {name}")
    rows = [
        (one.name, *(_measure(value) for value in (one.max_abs, one.relative, one.cosine)))
        for one in found.tensors
    ]
    if rows:
        print("\n".join(table_lines(("tensor", "max abs", "relative", "cosine"), rows)))
    print(f"{found.identical} tensor(s) identical, {len(found.tensors)} differ")
    return 0 if found.equal else 1


def dtype_of(wanted: ElementType | None) -> DType | None:
    """The element type that a flag names.

    Raises:
        UsageError: one that no APR file and no folder holds.
    """
    if wanted is ElementType.Q8_0:
        raise UsageError("q8_0 is written to gguf only", expected="f32, f16 or bf16")
    return DType[wanted.name] if wanted else None


def _measure(value: float | None) -> str:
    return "other shape" if value is None else f"{value:.6g}"
