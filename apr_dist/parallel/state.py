"""Optimizer state between memory and one safetensors file, by parameter name.

Names, not positions, tie a moment to its weight, so a file fits whatever order or grouping a later
version builds; whole tensors, not shards, so it fits another world size or strategy. Rank 0 writes it
and reads it for all. No pickle is written or read.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from apr_dist.atomic_files import atomic_path
from apr_dist.errors import DamagedModelFile
from apr_dist.parallel.moments import MOMENTS, STEP, fill_moments
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.sharding import whole_shape

STATE_DAMAGED = "FALSIFY-APR-DIST-CHECKPOINT-006"


def save_optimizer(moments: Mapping[str, torch.Tensor], path: Path) -> str:
    """Write whole moments and step counters, in host memory, atomically; rank 0 alone.

    Returns:
        ``sha256:...`` of the file's bytes (INV-TRAIN-003).

    Raises:
        OutputError: it cannot be written; a file that stood there still stands.
    """
    with atomic_path(path, overwrite=True) as temporary:
        try:
            save_file(dict(moments), temporary, metadata={"format": "apr-dist-adamw-v1"})
        except SafetensorError as error:  # the library wraps the operating system's refusal in its own
            raise OSError(None, str(error)) from error
    return file_digest(path)


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, path: Path | None, runtime: Runtime
) -> None:
    """Give the optimizer of every rank the state in rank 0's file.

    Args:
        model: the decoder whose parameters the optimizer holds.
        optimizer: AdamW without state.
        path: the file on rank 0, None elsewhere.
        runtime: this rank's view of the run.

    Raises:
        DamagedModelFile: on every rank: not a state file, or not of this model.
    """
    error = None
    if path is not None:
        try:
            _check_names(model, path)
        except DamagedModelFile as damaged:
            error = damaged
    runtime.agree(error)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_opened(path)) if path is not None else None
        empty = runtime.broadcast_json(None if file is None else not file.keys())
        if empty:  # saved before the first step
            return
        fill_moments(model, optimizer, None if file is None else file.get_tensor, runtime)


def _check_names(model: nn.Module, path: Path) -> None:
    with _opened(path) as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    wanted = {
        f"{name}.{key}": () if key == STEP else whole_shape(weight)
        for name, weight in model.named_parameters()
        for key in (*MOMENTS, STEP)
    }
    odd = [name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)]
    if found and odd:
        raise _damaged(path, f"{len(odd)} tensors are missing, left over or misshapen, first {min(odd)}")


def file_digest(path: Path) -> str:
    """``sha256:...`` of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise _damaged(path, f"it cannot be opened ({error})") from error


def _damaged(path: Path, what: str) -> DamagedModelFile:
    return DamagedModelFile(
        what,
        where=path,
        expected="the optimizer state that was saved with this checkpoint",
        remedy="resume from an earlier step folder, or start from checkpoint.apr with --init",
        falsifier=STATE_DAMAGED,
    )
