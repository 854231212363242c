"""Facts as lines of text: the tables that verbs print."""

from __future__ import annotations

from collections.abc import Iterator

from apr_dist.gates.adapters import BASE, STATED
from apr_dist.interop.inspection import FileReport
from apr_dist.report.verdict_table import table_lines

_DIMENSIONS = (
    *("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"),
    *("vocab_size", "max_position_embeddings", "rope_theta", "rms_norm_eps"),
)
_PROVENANCE = ("license", "data_source", "data_license", "source", "original_format")


def inspection_lines(report: FileReport, *, tensors: bool) -> list[str]:
    """What ``apr-dist inspect`` shows of a file."""
    lines = table_lines(("what", "value"), _facts(report))
    if report.quality is not None:
        ready = "ship-ready" if report.quality.ship_ready else "not ship-ready (90 is)"
        rows = [
            (part.name, f"{part.points}/{part.maximum}", "; ".join(part.remedies))
            for part in report.quality.parts
        ]
        lines += ["", f"quality {report.quality.score}/100, {ready}"]
        lines += table_lines(("part", "points", "to reach the rest"), rows)
    if tensors:
        index = [
            (one.name, one.dtype.name, "x".join(map(str, one.shape)), f"{one.size_bytes:,}")
            for one in report.tensors
        ]
        lines += ["", *table_lines(("tensor", "type", "shape", "bytes"), index)]
    return lines


def _facts(report: FileReport) -> Iterator[tuple[str, str]]:
    said = report.metadata.to_mapping()
    yield "file", f"{report.path} ({report.size_bytes / 1e6:,.1f} MB, APR v{report.version})"
    yield "checksum", report.checksum
    yield (
        "family",
        f"{report.family_shown} by tensor names, {report.family_claimed or 'no claim'} by metadata",
    )
    yield "architecture", f"{said.get('hf_architecture', '-')} ({said.get('architecture', '-')})"
    yield "parameters", f"{report.param_count:,} in {report.tensor_count} tensors"
    types = (f"{name}: {count} ({size / 1e6:,.1f} MB)" for name, (count, size) in report.dtypes.items())
    yield "element types", ", ".join(types)
    if isinstance(adapter := said.get(STATED), dict):
        kind = "dora" if adapter.get("use_dora") else "rslora" if adapter.get("use_rslora") else "lora"
        yield "adapter", f"{kind} of rank {adapter.get('r')}, alpha {adapter.get('lora_alpha')}"
        yield "its base", str(said.get(BASE, "-"))
    tie = {True: "tied to the embedding", False: "own matrix", None: "metadata and tensors contradict"}
    yield "output head", tie[report.tied]
    for key in _DIMENSIONS:
        yield key, str(said.get(key, "-"))
    held = report.tokenizer
    yield "tokenizer", f"{held.tokens:,} tokens ({held.where})" if held else "none"
    for key in _PROVENANCE:
        yield key, str(said.get(key) or "-")
    yield "flags", ", ".join(report.flags) or "-"
