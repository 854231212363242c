"""Weights from all ranks into one APR file, a run of elements at a time, read back before it counts.

Rank 0 asks for each tensor's parts in order and streams them to disk: it holds one run, never a tensor.
What the ranks give is what they hold, or a copy made before training went on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import xxhash
from torch import Tensor, nn

from apr_dist.apr.layout import VOCABULARY, DType, Flag
from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.apr.writer import AprWriter, TensorSpec
from apr_dist.errors import AprDistError, WeightsRefused
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.save_group import Exchange
from apr_dist.parallel.shard_layout import Piece, local, runs, span, whole_shape
from apr_dist.parallel.split_weights import split_of
from apr_dist.parallel.weights import host_array, saved_weights


@dataclass(frozen=True)
class WeightParts:
    """What this rank gives to a model file.

    Attributes:
        shapes: of every whole tensor, in the file's order.
        owners: of every tensor, the ranks that give a part, and from which element to which.
        pieces: this rank's parts, by name; none where another rank gives the same.
    """

    shapes: Mapping[str, tuple[int, ...]]
    owners: Mapping[str, tuple[tuple[int, int], ...]]
    pieces: Mapping[str, Piece]

    def on_host(self) -> WeightParts:
        """The same with copies in host memory, which later steps do not change."""
        return replace(self, pieces={name: piece.on_host() for name, piece in self.pieces.items()})


def weight_parts(model: nn.Module, runtime: Runtime) -> WeightParts:
    """This rank's parts of what a checkpoint holds: those of the first copy, as views of what is trained."""
    weights = dict(sorted(saved_weights(model).items(), key=lambda item: item[0].encode()))
    shapes = {name: whole_shape(weight) for name, weight in weights.items()}
    return WeightParts(
        shapes=shapes,
        owners={
            name: tuple(span(shape, runtime, rank) for rank in range(runtime.shard_size))
            for name, shape in shapes.items()
        },
        pieces={
            name: Piece(
                name,
                shapes[name],
                span(shapes[name], runtime, runtime.rank)[0],
                local(weight, runtime),
                split_of(weight),
            )
            for name, weight in weights.items()
            if runtime.rank < runtime.shard_size
        },
    )


def save_weights(
    parts: WeightParts, path: Path, metadata: AprMetadata | None, *, overwrite: bool, exchange: Exchange
) -> None:
    """Write every parameter as f32 into one APR file on rank 0, and read it back to prove it.

    Every rank calls this.

    Args:
        parts: what this rank gives.
        path: the file to make.
        metadata: on rank 0; None elsewhere.
        overwrite: whether an existing file may be replaced.
        exchange: this rank's end of the group that the parts travel over.

    Raises:
        OutputError: on all ranks: the file cannot be written; what was there before is still there.
        WeightsRefused: on all ranks: the file on disk does not hold what the model holds.
    """
    error: AprDistError | None = None
    if metadata is not None:
        arriving = _arriving(parts, exchange)
        try:
            _write(path, metadata, parts.shapes, arriving, overwrite=overwrite, exchange=exchange)
        except AprDistError as refused:
            error = refused
            for _ in arriving:  # the others are giving their parts: nobody waits for rank 0
                pass
    else:
        for name in parts.shapes:
            _give(parts.pieces.get(name), exchange)
    exchange.agree(error)


def _give(piece: Piece | None, exchange: Exchange) -> None:
    if piece is not None:
        for count, at in runs(0, piece.values.numel()):
            exchange.send(torch.from_numpy(host_array(piece.run(at, count))))


def _arriving(parts: WeightParts, exchange: Exchange) -> Iterator[tuple[str, Tensor]]:
    """(name, run of f32 elements in host memory) of every tensor in the file's order, on rank 0."""
    for name, owners in parts.owners.items():
        for rank, (begin, end) in enumerate(owners):
            for count, at in runs(begin, end):
                if rank == exchange.rank:
                    yield name, torch.from_numpy(host_array(parts.pieces[name].run(at - begin, count)))
                else:
                    run = torch.empty(count, dtype=torch.float32)
                    exchange.receive(run, rank)
                    yield name, run


def _write(
    path: Path,
    metadata: AprMetadata,
    shapes: Mapping[str, tuple[int, ...]],
    arriving: Iterator[tuple[str, Tensor]],
    *,
    overwrite: bool,
    exchange: Exchange,
) -> None:
    specs = [TensorSpec(name, DType.F32, shape) for name, shape in shapes.items()]
    written = {name: xxhash.xxh3_128() for name in shapes}
    flags = Flag.ROW_MAJOR | (Flag.HAS_VOCAB if VOCABULARY in metadata.custom else Flag(0))
    with AprWriter(path, metadata=metadata, tensors=specs, flags=flags, overwrite=overwrite) as writer:
        for name, run in arriving:
            array = run.numpy()
            written[name].update(array.data)
            writer.append(name, array)
            exchange.moved()
    with AprReader(path) as reader:
        for name, hashed in written.items():
            found = xxhash.xxh3_128_hexdigest(reader.float32(name).data) if name in reader.tensors else None
            if found != hashed.hexdigest():
                raise WeightsRefused(
                    f"{name} on disk is not the tensor that was saved",
                    where=path,
                    expected="every tensor back bit for bit",
                    remedy="check the disk; do not use this file",
                    falsifier="FALSIFY-APR-DIST-CHECKPOINT-002",
                )
            reader.forget(name)
            exchange.moved()
