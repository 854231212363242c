"""What an import is asked for, and the one way it writes: proven by the gates of training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from apr_dist.apr.layout import DType, Flag
from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.apr.writer import AprWriter, TensorSpec
from apr_dist.errors import DimensionsUnstated
from apr_dist.gates.architecture import HEAD, HeadFacts
from apr_dist.gates.model_file import check_model, prove_model
from apr_dist.gates.weights import check_values
from apr_dist.interop.convert import Piece, Progress, count_dtypes, counted, total_bytes
from apr_dist.interop.stored_names import CLAIM


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """What an import made.

    Attributes:
        source: the file or folder that was read.
        target: the APR file that was written.
        original_format: ``"gguf"``, ``"safetensors"``, ``"apr-v1"`` or ``"apr shards"``.
        tensor_count: tensors in the target.
        param_count: elements in the target.
        size_bytes: length of the target file.
        dtypes: tensors in the target by dtype name.
        tied: whether the head is the embedding.
        notes: what was decided on the way and is worth telling, one sentence each.
    """

    source: Path
    target: Path
    original_format: str
    tensor_count: int
    param_count: int
    size_bytes: int
    dtypes: Mapping[str, int]
    tied: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """What is to be imported, and how.

    Attributes:
        source: the file or folder to read.
        target: APR file to make.
        dtype: element type of every tensor; None keeps F32, F16 and BF16 and makes F16 of what was quantised.
        tie: whether the head is the embedding; None decides from configuration and tensors.
        overwrite: whether ``target`` may exist.
        progress: told how far the writing is.
    """

    source: Path
    target: Path
    dtype: DType | None = None
    tie: bool | None = None
    overwrite: bool = False
    progress: Progress | None = None

    def write(
        self,
        pieces: Iterable[tuple[str, Piece]],
        *,
        metadata: AprMetadata,
        specs: Sequence[TensorSpec],
        original_format: str,
        notes: Sequence[str] = (),
        flags: Flag = Flag.ROW_MAJOR,
        verbatim: bool = False,
        may_leave_unstated: bool = False,
    ) -> ImportSummary:
        """Write a file that appears only if training would accept it.

        Names and shapes are checked before anything is written, every value before the file takes its place.

        Args:
            pieces: the elements of every tensor, in order within each; taken one after the other.
            metadata: what the file will state.
            specs: what it will hold.
            original_format: see ``ImportSummary``.
            notes: what was decided while reading.
            flags: as `AprWriter`.
            verbatim: as `AprWriter`.
            may_leave_unstated: a source that leaves a dimension unstated is accepted, because its format has
                no other place for it, and a note says how to state it.

        Raises:
            GateRefused: a gate of a model file says no.
            OutputError: as `AprWriter`.
        """
        unstated = self._check(metadata, specs, may_leave_unstated)

        def prove(written: Path) -> None:
            with AprReader(written, verify="structure") as reader:
                if unstated is None:
                    prove_model(reader, where=self.source)
                else:
                    check_values(reader, list(reader.tensors), where=self.source)

        report = counted(self.progress, total_bytes(specs))
        with AprWriter(
            self.target,
            metadata=metadata,
            tensors=specs,
            flags=flags,
            overwrite=self.overwrite,
            verbatim=verbatim,
            prove=prove,
        ) as writer:
            for name, piece in pieces:
                writer.append(name, piece)
                report(piece.nbytes)
        return ImportSummary(
            source=self.source,
            target=self.target,
            original_format=original_format,
            tensor_count=len(specs),
            param_count=sum(math.prod(spec.shape) for spec in specs),
            size_bytes=self.target.stat().st_size,
            dtypes=count_dtypes(specs),
            tied=HEAD not in {spec.name for spec in specs},
            notes=(*notes, *(() if unstated is None else (unstated,))),
        )

    def _check(self, metadata: AprMetadata, specs: Sequence[TensorSpec], lenient: bool) -> str | None:
        """Ask the gates of names and shapes; the note where a dimension may stay unstated and does."""
        shapes = {spec.name: spec.shape for spec in specs}
        head = HeadFacts(present=HEAD in shapes, equals_embedding=metadata.custom.get(CLAIM) is True or None)
        try:
            check_model(metadata.to_mapping(), shapes, head, where=self.source)
        except DimensionsUnstated:
            if not lenient:
                raise
            try:
                check_model(metadata.to_mapping(), shapes, head, where=self.target)
            except DimensionsUnstated as refusal:  # said of the file that can be stamped
                return f"training and validate refuse this file so far: {refusal}"
        return None
