"""Verbs over adapters: merge."""

from __future__ import annotations

from pathlib import Path

from apr_dist.apr.layout import DType
from apr_dist.choices import MergeInto
from apr_dist.cli.files import ElementType, Output, dtype_of
from apr_dist.cli.progress import bytes_bar


def merge(
    *,
    base: Path,
    adapter: Path,
    output: Output,
    dtype: ElementType | None = None,
    into: MergeInto = MergeInto.TRAINED,
    force: bool = False,
) -> None:
    """Write a base model with an adapter merged into it, proven to compute what base and adapter do.

    The adapter must have been trained beside just these weights: it names them by digest. The base is read
    and the result written one tensor at a time; then the logits of both are compared a block at a time, so
    neither model is ever held whole.

    Example: apr-dist merge --base model.apr --adapter runs/lora/adapter -o merged.apr

    Args:
        base: APR file that was --init of the adapter's run.
        adapter: folder with adapter_config.json and adapter_model.safetensors, or checkpoint.apr of the run.
        output: APR file to write.
        dtype: element type to write; by default the base's.
        into: trained: the base's values as they were kept in training; original: the file's own.
        force: replace an existing output.
    """
    from apr_dist.interop.merge import BOUNDS, merge_adapter  # noqa: PLC0415  (loads PyTorch)

    with bytes_bar(f"merging into {base.name}") as progress:
        summary = merge_adapter(
            base, adapter, output, dtype=dtype_of(dtype), into=into, overwrite=force, progress=progress
        )
    print(
        f"{output}: {summary.tensor_count} tensors, {summary.merged} linear maps merged,"
        f" {summary.size_bytes / 1e6:,.1f} MB"
    )
    for kind, distance in summary.apart.items():
        when = "before rounding" if kind is DType.F32 and len(summary.apart) > 1 else "as stored"
        print(
            f"proven: merged logits in {kind.name} {when} are within {distance:.1e} of base and adapter"
            f" (bound {BOUNDS[kind]:.0e}, the adapter itself moves them by {summary.effect:.1e})"
        )
    for note in summary.notes:
        print(f"note: {note}")
