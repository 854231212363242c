"""Gate: what a run keeps in host memory is there, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

import psutil

from apr_dist.choices import ActivationCheckpointing, GradientStorage, WeightStorage
from apr_dist.config import TrainConfig
from apr_dist.errors import UsageError
from apr_dist.model.config import TransformerConfig
from apr_dist.parallel.storage import Storage
from apr_dist.parallel.stored_bytes import F32, stored_bytes
from apr_dist.parallel.strategy import named

_GIB = 1 << 30


def host_bytes(model: TransformerConfig, config: TrainConfig, *, world_size: int) -> int:
    """What one process of the run keeps in host memory because of the rungs that move it there."""
    strategy, memory = named(config.parallel.strategy, world_size), config.memory
    storage = Storage(weights=memory.weights, gradients=memory.gradients, offload=config.parallel.offload)
    total = 0
    if storage.streams(strategy):
        stored = stored_bytes(model, strategy, storage, config.optimizer.state_bits)
        total += stored.low + stored.gradients + stored.moments
    if config.compute.activation_checkpointing is ActivationCheckpointing.FULL_OFFLOAD:
        tokens = config.micro_batch(world_size) * config.seq_length
        total += F32 * tokens * model.hidden_size * model.num_layers
    return total


def check_host_memory(
    model: TransformerConfig,
    config: TrainConfig,
    *,
    world_size: int,
    processes: int,
    available: int | None = None,
) -> None:
    """Refuse a run whose offloaded state has no room.

    Args:
        model: its architecture.
        config: the resolved configuration.
        world_size: processes of the run.
        processes: of them on this machine.
        available: bytes of host memory; None: what this machine has free.

    Raises:
        UsageError: with the bytes, and the settings of the ladder that would fit.
    """
    needed = processes * host_bytes(model, config, world_size=world_size)
    free = psutil.virtual_memory().available if available is None else available
    if needed <= free:
        return
    fitting = [
        f"{flags} ({size / _GIB:.1f} GiB)"
        for flags, smaller in _smaller(config)
        if (size := processes * host_bytes(model, smaller, world_size=world_size)) <= free
    ]
    raise UsageError(
        f"what is offloaded takes {needed / _GIB:.1f} GiB of host memory and {free / _GIB:.1f} GiB are free",
        where=f"--parallel.offload {config.parallel.offload}",
        expected=f"{needed / _GIB:.1f} GiB for {processes} process(es) of this machine",
        remedy=f"use {fitting[0]}" if fitting else "use a machine with more memory: no rung makes it fit",
    )


def _smaller(config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    """What takes less host memory, the one that changes least first."""
    changes: dict[str, dict[str, object]] = {}
    eight: dict[str, object] = {}
    if config.optimizer.state_bits == 32:
        eight = {"optimizer": config.optimizer.model_copy(update={"state_bits": 8})}
        yield "--optimizer.state-bits 8", config.model_copy(update=eight)
    bf16 = {"gradients": GradientStorage.BF16}
    if config.memory.gradients is GradientStorage.F32:
        changes["--memory.gradients bf16"] = {"memory": config.memory.model_copy(update=bf16)}
    if config.memory.weights is not WeightStorage.BF16:
        both = {**bf16, "weights": WeightStorage.BF16}
        changes["--memory.gradients bf16 --memory.weights bf16"] = {
            "memory": config.memory.model_copy(update=both)
        }
    for flags, update in changes.items():
        yield flags, config.model_copy(update=update)
    for flags, update in changes.items() if eight else ():
        yield f"--optimizer.state-bits 8 {flags}", config.model_copy(update={**eight, **update})
