"""The one way an import writes a model: proven by the gates of training before it takes its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from apr_dist.apr.layout import Flag
from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.apr.writer import AprWriter, TensorSpec
from apr_dist.errors import DimensionsUnstated
from apr_dist.gates.architecture import HEAD, HeadFacts
from apr_dist.gates.model_file import check_model, prove_model
from apr_dist.gates.weights import check_values


def proven_writer(
    target: Path,
    *,
    metadata: AprMetadata,
    tensors: Sequence[TensorSpec],
    source: Path,
    flags: Flag = Flag.ROW_MAJOR,
    overwrite: bool = False,
    verbatim: bool = False,
    unstated: list[str] | None = None,
    also: Callable[[Path], None] | None = None,
) -> AprWriter:
    """A writer whose file appears only if training would accept it.

    Names and shapes are checked before anything is written, every value before the file takes its place.

    Args:
        target: APR file to make.
        metadata: what it will state.
        tensors: what it will hold.
        source: the file or folder a refusal names.
        flags: as `AprWriter`.
        overwrite: as `AprWriter`.
        verbatim: as `AprWriter`.
        unstated: given, a source that leaves a dimension unstated is accepted, because its format has no
            other place for it, and a note that says how to state it is added here.
        also: called with the finished file after the gates; what it raises discards the file.

    Raises:
        GateRefused: a gate of a model file says no.
        OutputError: as `AprWriter`.
    """
    shapes = {spec.name: spec.shape for spec in tensors}
    claim = metadata.custom.get("tie_word_embeddings")
    head = HeadFacts(present=HEAD in shapes, equals_embedding=claim is True or None)
    whole = True
    try:
        check_model(metadata.to_mapping(), shapes, head, where=source)
    except DimensionsUnstated:
        if unstated is None:
            raise
        whole = False
        try:
            check_model(metadata.to_mapping(), shapes, head, where=target)
        except DimensionsUnstated as refusal:  # said of the file that can be stamped
            unstated.append(f"training and validate refuse this file so far: {refusal}")

    def prove(written: Path) -> None:
        with AprReader(written, verify="structure") as reader:
            if whole:
                prove_model(reader, where=source)
            else:
                check_values(reader, list(reader.tensors), where=source)
        if also is not None:
            also(written)

    return AprWriter(
        target,
        metadata=metadata,
        tensors=tensors,
        flags=flags,
        overwrite=overwrite,
        verbatim=verbatim,
        prove=prove,
    )
