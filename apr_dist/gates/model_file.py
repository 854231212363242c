"""The gates of a model file, the same for every command that takes one.

Training, ``plan``, ``validate``, ``stamp``, ``diff``, ``generate``, every import and every export ask here,
so a file that training would refuse is refused everywhere, in the same words. The order is fixed: one whole
file, its family, its dimensions, every shape, every value. Nothing here needs PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apr_dist.apr.layout import Flag
from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.errors import UnsupportedModelFile
from apr_dist.gates.adapters import STATED
from apr_dist.gates.architecture import (
    EMBEDDING,
    HEAD,
    MATCH,
    HeadFacts,
    check_dimensions,
    check_family,
)
from apr_dist.gates.result import GateResult
from apr_dist.gates.weights import MISSING, check_names_and_shapes, check_values
from apr_dist.model.config import TransformerConfig

Shapes = Mapping[str, tuple[int, ...]]

_PIECE = 4 << 20  # bytes of head and embedding compared at a time


Progress = Callable[[str, int, int], None]
"""Called with (what is done, how much of it is done, how much there is)."""


@dataclass(frozen=True, kw_only=True)
class ProvenModel:
    """A model file that passed every gate.

    Attributes:
        config: architecture of the decoder it holds.
        results: the gates that passed, in order.
        digest: ``sha256:...`` of the file; None unless asked for.
    """

    config: TransformerConfig
    results: tuple[GateResult, ...]
    digest: str | None


def check_model(
    metadata: Mapping[str, Any], shapes: Shapes, head: HeadFacts, *, where: Path
) -> TransformerConfig:
    """Family, dimensions, and every tensor's name and shape, from what a file states.

    Args:
        metadata: flat APR metadata.
        shapes: shape of every tensor by name.
        head: what is known of the output head.
        where: the file or folder a refusal names.

    Raises:
        ArchitectureRefused: no decoder, two families, or a dimension that is missing or impossible.
        WeightsRefused: a tensor is missing, left over, or has another shape.
    """
    family = check_family(metadata, shapes, where=where)
    config = check_dimensions(metadata, head, family=family, where=where)
    expected = config.parameter_shapes()
    present = {name: shape for name, shape in shapes.items() if name != HEAD or name in expected}
    check_names_and_shapes(expected, present, where=where)
    return config


def prove_model(
    reader: AprReader,
    *,
    read_values: bool = True,
    metadata: AprMetadata | None = None,
    where: Path | None = None,
    with_digest: bool = False,
    passed: Callable[[GateResult], None] = lambda _: None,
    progress: Progress | None = None,
) -> ProvenModel:
    """Every gate of an open model file.

    Args:
        reader: the file.
        read_values: off, only header, metadata and index are asked about, however large the file.
        metadata: what the file is about to state in place of its own metadata (``stamp``).
        where: what a refusal names in place of the file (an import names its source).
        with_digest: also hash the whole file, while the values are looked at.
        passed: called with each result as its gate passes.
        progress: called with (what is done, bytes of it that are done, bytes in all), from any thread.

    Raises:
        UnsupportedModelFile: the file is one shard of a model.
        GateRefused: the first gate that says no.
    """
    where, results = where or reader.path, []
    shapes = {name: entry.shape for name, entry in reader.tensors.items()}
    stated = (metadata or reader.metadata).to_mapping()

    def note(result: GateResult) -> None:
        results.append(result)
        passed(result)

    refuse_shard(reader, where)
    refuse_adapter(reader, where)
    note(_intact(reader, checksums=read_values))
    config = check_model(stated, shapes, _head_facts(reader), where=where)
    note(_family_result(stated, config))
    expected, count, digest = config.parameter_shapes(), None, None
    if read_values:
        with ThreadPoolExecutor(1, "digest") as pool:  # one core hashes while the others look at values
            hashing = pool.submit(reader.digest, named("hashing the file", progress)) if with_digest else None
            seen = named("looking at every value", progress)
            count = check_values(reader, list(expected), where=where, progress=seen)
            digest = hashing.result() if hashing else None
    note(_weights_result(len(expected), count))
    return ProvenModel(config=config, results=tuple(results), digest=digest)


def named(what: str, progress: Progress | None) -> Callable[[int, int], None] | None:
    """A callback for one piece of work, called with (done, in all)."""
    return None if progress is None else lambda done, of: progress(what, done, of)


def refuse_shard(reader: AprReader, where: Path) -> None:
    """Refuse a file that is one shard of a model where the whole model is needed.

    Raises:
        UnsupportedModelFile: its header says so.
    """
    if Flag.SHARDED in reader.header.flags:
        raise UnsupportedModelFile(
            f"the file is one shard of a model ({len(reader.tensors)} tensors)",
            where=where,
            expected="a whole model",
            remedy="join the shards: apr-dist import MANIFEST.json -o model.apr",
        )


def refuse_adapter(reader: AprReader, where: Path) -> None:
    """Refuse a file that holds an adapter where a model is needed.

    Raises:
        UnsupportedModelFile: its metadata say so.
    """
    if STATED in reader.metadata.custom:
        raise UnsupportedModelFile(
            f"the file holds an adapter ({len(reader.tensors)} tensors), not a model",
            where=where,
            expected="a whole model",
            remedy=f"apr-dist merge --base BASE.apr --adapter {where} -o merged.apr",
        )


def _head_facts(reader: AprReader) -> HeadFacts:
    present = HEAD in reader.tensors
    both = present and EMBEDDING in reader.tensors
    return HeadFacts(
        present=present, equals_embedding=same_payload(reader, HEAD, EMBEDDING) if both else None
    )


def same_payload(reader: AprReader, left: str, right: str) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    one, other = reader.tensors[left], reader.tensors[right]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    first, second = (np.frombuffer(reader.raw(name), np.uint8) for name in (left, right))
    # Piece by piece: two that differ do so in the first, and no more of them is read.
    pieces = range(0, first.size, _PIECE)
    return all(np.array_equal(first[at : at + _PIECE], second[at : at + _PIECE]) for at in pieces)


def _intact(reader: AprReader, *, checksums: bool) -> GateResult:
    return GateResult(
        id="FALSIFY-APR-DIST-CHECKPOINT-001",
        gate="model file is intact",
        measured=f"{reader.size_bytes / 1e6:,.1f} MB, {len(reader.tensors)} tensors, "
        + ("checksums match" if checksums else "header, metadata and index agree"),
        required="APR v2" + (", every checksum right" if checksums else ", consistent with itself"),
    )


def _family_result(metadata: Mapping[str, Any], config: TransformerConfig) -> GateResult:
    claim = metadata.get("hf_architecture") or metadata.get("architecture") or "no claim"
    measured, required = f"{config.family} ({claim})", "a decoder; metadata and names of one family"
    return GateResult(MATCH, "family agrees with tensor names", measured, required)


def _weights_result(tensors: int, values: int | None) -> GateResult:
    return GateResult(
        id=MISSING,
        gate="every weight is there",
        measured=f"{tensors} of {tensors} tensors, "
        + ("shapes fit" if values is None else f"{values:,} finite values"),
        required="none missing, left over or misshapen" + ("" if values is None else ", all finite"),
    )
