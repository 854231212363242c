"""Weights between one file and all ranks, one tensor at a time, proven on arrival.

Rank 0 reads a tensor, every rank receives it, nobody ever holds a second copy of the model. What
arrived is proven by digest against what the file holds. Which tensors a file must hold is the
business of ``gates.weights``; sharded training state is not handled here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import nn

from apr_dist.apr.layout import DType
from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.apr.writer import AprWriter, TensorSpec
from apr_dist.errors import WeightsRefused
from apr_dist.parallel.runtime import Runtime

ARRIVAL = "FALSIFY-APR-DIST-TRAINER-001"
"""Falsifier of every refusal that a weight in the network is not the weight in the file."""

Progress = Callable[[str, int, int], None]
"""Called with (tensor name, tensors done, tensors in all)."""


def named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every distinct parameter once, by its canonical (Hugging Face and APR) name."""
    yield from model.named_parameters(remove_duplicate=True)


def load_weights(
    model: nn.Module, reader: AprReader | None, runtime: Runtime, progress: Progress | None = None
) -> dict[str, str]:
    """Stream every tensor from rank 0's file into the model of every rank, and prove it arrived.

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
    names = [name for name, _ in named_weights(model)]
    expected: dict[str, str] = {}
    with torch.no_grad():
        for done, (name, parameter) in enumerate(named_weights(model), start=1):
            if reader is not None:
                values = reader.float32(name)
                expected[name] = _digest_array(values)
                parameter.copy_(torch.utils.dlpack.from_dlpack(values))
            if runtime.world_size > 1:
                dist.broadcast(parameter.data, src=0)
            if progress is not None and runtime.is_main:
                progress(name, done, len(names))
    digests: dict[str, str] = runtime.broadcast_json(expected)
    prove_weights(model, digests, runtime)
    return digests


def prove_weights(model: nn.Module, expected: Mapping[str, str], runtime: Runtime) -> None:
    """Compare every tensor of every rank with the digests it must have.

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
    """Digest of each parameter's f32 values, by name."""
    return {name: _digest_tensor(parameter) for name, parameter in named_weights(model)}


def model_digest(model: nn.Module) -> str:
    """``sha256:...`` over the names and digests of all parameters: the identity of the weights."""
    lines = "\n".join(f"{name} {value}" for name, value in sorted(weight_digests(model).items()))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def save_weights(model: nn.Module, path: Path, metadata: AprMetadata, *, overwrite: bool) -> None:
    """Write every parameter as f32 into one APR file, and read it back to prove it.

    Rank 0 calls this alone; under DDP its replica is the model.

    Raises:
        OutputError: the file cannot be written; what was there before is still there.
        WeightsRefused: the file on disk does not hold what the model holds.
    """
    specs = [TensorSpec(name, DType.F32, tuple(weight.shape)) for name, weight in named_weights(model)]
    with AprWriter(path, metadata=metadata, tensors=specs, overwrite=overwrite) as writer:
        weights = dict(named_weights(model))
        for name in sorted(weights, key=str.encode):
            writer.write(name, _host_array(weights[name]))
    with AprReader(path) as reader:
        for name, value in weight_digests(model).items():
            if name not in reader.tensors or _digest_array(reader.float32(name)) != value:
                raise WeightsRefused(
                    f"{name} on disk is not the tensor that was saved",
                    where=path,
                    expected="every tensor back bit for bit",
                    remedy="check the disk; do not use this file",
                    falsifier="FALSIFY-APR-DIST-CHECKPOINT-002",
                )


def _host_array(weight: torch.Tensor) -> np.ndarray:
    array: np.ndarray = weight.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy()
    return array


def _digest_tensor(weight: torch.Tensor) -> str:
    return _digest_array(_host_array(weight))


def _digest_array(values: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(values).data)
