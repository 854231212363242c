"""Weights between one file and all ranks, one tensor at a time, proven on arrival.

Rank 0 reads a tensor, every rank receives it, nobody ever holds a second copy of the model. What
arrived is proven by digest against what the file holds. Which tensors a file must hold is the
business of ``gates.weights``; sharded training state is not handled here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from apr_dist.apr.digests import values_digest as _digest_array
from apr_dist.apr.digests import weights_digest
from apr_dist.apr.layout import VOCABULARY, DType, Flag
from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.apr.writer import AprWriter, TensorSpec
from apr_dist.errors import AprDistError, WeightsRefused
from apr_dist.model.config import TransformerConfig
from apr_dist.model.transformer import initial_weight
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.sharding import fill, gathered, reshard, whole_shape

ARRIVAL = "FALSIFY-APR-DIST-TRAINER-001"
"""Falsifier of every refusal that a weight in the network is not the weight in the file."""

Progress = Callable[[str, int, int], None]
"""Called with (tensor name, tensors done, tensors in all)."""


Source = Callable[[str, tuple[int, ...]], torch.Tensor]
"""Gives the f32 values of a tensor, in host memory, by its name and shape."""


def named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every distinct parameter once, by its canonical (Hugging Face and APR) name."""
    reshard(model)
    yield from model.named_parameters(remove_duplicate=True)


def load_weights(
    model: nn.Module, reader: AprReader | None, runtime: Runtime, progress: Progress | None = None
) -> dict[str, str]:
    """Stream every tensor from rank 0's file into the parts of the model on every rank, and prove it.

    Args:
        model: a materialised decoder whose values are still arbitrary.
        reader: the open file on rank 0, None elsewhere.
        runtime: this rank's view of the run.
        progress: called on rank 0 after each tensor.

    Returns:
        tensor name to digest of the f32 values that the file holds and the model now has.

    Raises:
        WeightsRefused: on all ranks, when any rank's tensor is not the file's.
    """
    return _stream(model, _from_file(reader) if reader is not None else None, runtime, progress)


def draw_weights(
    model: nn.Module, config: TransformerConfig, runtime: Runtime, *, seed: int
) -> dict[str, str]:
    """Give every tensor its value from scratch (``model.transformer.initial_weight``), by the same way.

    Returns:
        tensor name to digest, as `load_weights`.
    """

    def drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return initial_weight(name, shape, config=config, seed=seed)

    return _stream(model, drawn if runtime.is_main else None, runtime, None)


def _stream(
    model: nn.Module, source: Source | None, runtime: Runtime, progress: Progress | None
) -> dict[str, str]:
    names = [name for name, _ in named_weights(model)]
    expected: dict[str, str] = {}
    with torch.no_grad():
        for done, (name, parameter) in enumerate(named_weights(model), start=1):
            values = source(name, whole_shape(parameter)) if source is not None else None
            if values is not None:
                expected[name] = _digest(values)
            fill(parameter, values, runtime)
            del values
            if progress is not None and runtime.is_main:
                progress(name, done, len(names))
    digests: dict[str, str] = runtime.broadcast_json(expected)
    prove_weights(model, digests, runtime)
    return digests


def _from_file(reader: AprReader) -> Source:
    """Reads a file's tensors as f32, letting go of each one's pages before the next."""
    held: list[str] = []

    def read(name: str, _: tuple[int, ...]) -> torch.Tensor:
        while held:
            reader.forget(held.pop())
        held.append(name)
        return torch.utils.dlpack.from_dlpack(reader.float32(name))

    return read


def prove_weights(model: nn.Module, expected: Mapping[str, str], runtime: Runtime) -> None:
    """Compare every tensor, as every rank sees it whole, with the digest it must have; a collective.

    Raises:
        WeightsRefused: on all ranks, naming the first tensor that differs on the lowest such rank.
    """
    found = weight_digests(model)
    wrong = [name for name in found if expected.get(name) != found[name]]
    wrong += [name for name in expected if name not in found]
    counts = torch.zeros(runtime.world_size, dtype=torch.int64, device=runtime.device)
    counts[runtime.rank] = len(wrong)
    bad_ranks = [rank for rank, count in enumerate(runtime.sum(counts).tolist()) if count]
    if bad_ranks:
        named = f", first {wrong[0]}" if wrong else ""
        raise WeightsRefused(
            f"weights on rank(s) {bad_ranks} differ from what they were loaded from{named}",
            expected=f"{len(expected)} tensors with the digests of their source",
            remedy="check the memory and links of that machine, then start again",
            falsifier=ARRIVAL,
        )


def weight_digests(model: nn.Module) -> dict[str, str]:
    """Digest of each parameter's whole f32 values, by name; a collective where parameters are sharded."""
    found = {}
    for name, parameter in named_weights(model):
        with gathered(parameter) as values:
            found[name] = _digest(values)
    return found


def model_digest(model: nn.Module) -> str:
    """``sha256:...`` over the names and digests of all parameters: the identity of the weights."""
    return weights_digest(weight_digests(model))


def save_weights(
    model: nn.Module,
    path: Path,
    metadata: AprMetadata | None,
    *,
    overwrite: bool,
    runtime: Runtime | None = None,
) -> None:
    """Write every parameter as f32 into one APR file on rank 0, and read it back to prove it.

    With a runtime every rank calls this, and sharded tensors are gathered one at a time.

    Args:
        model: the decoder.
        path: the file to make.
        metadata: on rank 0; None elsewhere.
        overwrite: whether an existing file may be replaced.
        runtime: this rank's view of the run; None: this process holds the model alone.

    Raises:
        OutputError: on all ranks: the file cannot be written; what was there before is still there.
        WeightsRefused: on all ranks: the file on disk does not hold what the model holds.
    """
    weights = dict(sorted(named_weights(model), key=lambda item: item[0].encode()))
    error: AprDistError | None = None
    turns = iter(weights.items())
    if metadata is not None:
        try:
            _write(path, metadata, turns, weights, overwrite=overwrite)
        except AprDistError as refused:
            if runtime is None:
                raise
            error = refused
    if runtime is None:
        return
    # The other ranks only give their parts; after a refusal so does rank 0, that nobody waits for it.
    for _, parameter in turns:
        with gathered(parameter):
            pass
    runtime.agree(error)


def _write(
    path: Path,
    metadata: AprMetadata,
    turns: Iterator[tuple[str, nn.Parameter]],
    weights: Mapping[str, nn.Parameter],
    *,
    overwrite: bool,
) -> None:
    specs = [TensorSpec(name, DType.F32, whole_shape(weight)) for name, weight in weights.items()]
    written: dict[str, str] = {}
    flags = Flag.ROW_MAJOR | (Flag.HAS_VOCAB if VOCABULARY in metadata.custom else Flag(0))
    with AprWriter(path, metadata=metadata, tensors=specs, flags=flags, overwrite=overwrite) as writer:
        for name, parameter in turns:
            with gathered(parameter) as values:
                array = _host_array(values)
                written[name] = _digest_array(array)
                writer.write(name, array)
    with AprReader(path) as reader:
        for name, value in written.items():
            if name not in reader.tensors or _digest_array(reader.float32(name)) != value:
                raise WeightsRefused(
                    f"{name} on disk is not the tensor that was saved",
                    where=path,
                    expected="every tensor back bit for bit",
                    remedy="check the disk; do not use this file",
                    falsifier="FALSIFY-APR-DIST-CHECKPOINT-002",
                )
            reader.forget(name)


def _host_array(weight: torch.Tensor) -> np.ndarray:
    array: np.ndarray = weight.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy()
    return array


def _digest(values: torch.Tensor) -> str:
    return _digest_array(_host_array(values))
