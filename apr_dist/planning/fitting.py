"""Which rungs of the memory ladder fit a card and a host with the least slowdown.

Time is counted in two ways: blocks that are computed twice take their share of the arithmetic again, and what
moves between card and host takes its bytes over the rate of that link, as if nothing overlapped.
Weights that are exact come before those that are rounded; of equal times the one that changes least is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from apr_dist.choices import ActivationCheckpointing, GradientStorage, Offload, WeightStorage
from apr_dist.config import TrainConfig
from apr_dist.errors import AprDistError, UsageError
from apr_dist.gates.settings import check_settings
from apr_dist.planning.memory import Memory

LINK_BYTES_S = 20e9
"""Rate of the link between card and host in each direction: PCIe 4.0 x16 as it is measured."""

CONTEXT_BYTES = 768 << 20
"""Of a card, what the driver, its context and the libraries take, which no plan counts."""

_RECOMPUTED = {
    ActivationCheckpointing.OFF: 0.0,
    ActivationCheckpointing.SELECTIVE: 1 / 6,
    ActivationCheckpointing.FULL: 1 / 3,
    ActivationCheckpointing.FULL_OFFLOAD: 1 / 3,
}
"""Arithmetic that is done again, as a share of forward and backward; a forward is a third of both."""

_WEIGHTS = (WeightStorage.F32, WeightStorage.SPLIT, WeightStorage.BF16)
_GRADIENTS = (GradientStorage.F32, GradientStorage.BF16)
_BITS = (32, 8)
_OFFLOADS = (Offload.NONE, Offload.OPTIMIZER)


@dataclass(frozen=True, kw_only=True)
class Rungs:
    """One choice of rungs.

    Attributes:
        config: the configuration with it.
        memory: of one process.
        seconds: what it adds to a step.
    """

    config: TrainConfig
    memory: Memory
    seconds: float

    @property
    def is_exact(self) -> bool:
        """Whether every weight is the f32 it would be."""
        return self.config.memory.weights is not WeightStorage.BF16

    @property
    def keys(self) -> dict[str, str]:
        """The rungs by key."""
        config = self.config
        return {
            "memory.weights": config.memory.weights.value,
            "memory.gradients": config.memory.gradients.value,
            "optimizer.state_bits": str(config.optimizer.state_bits),
            "parallel.offload": config.parallel.offload.value,
            "compute.activation_checkpointing": config.compute.activation_checkpointing.value,
        }


def fit(
    estimates: Callable[[TrainConfig], Memory],
    config: TrainConfig,
    *,
    card: int,
    host: int | None,
    step_s: float,
) -> Rungs:
    """The choice that fits with the least slowdown.

    Args:
        estimates: memory of one process of a configuration.
        config: everything but the rungs.
        card: bytes of the card that the run may use.
        host: bytes of host memory for each process; None: nothing is moved there.
        step_s: seconds of a step's arithmetic.

    Raises:
        UsageError: nothing fits, with the least that would be needed.
    """
    found = [one for one in _choices(estimates, config, step_s) if _kept_on_host(one.memory) <= (host or 0)]
    fitting = [one for one in found if one.memory.total + CONTEXT_BYTES <= card]
    if fitting:
        # Of equal ones the first, which changes least; weights that are rounded only where no others fit.
        return min(fitting, key=lambda one: (not one.is_exact, one.seconds))
    least = min(found, key=lambda one: one.memory.total, default=None)
    raise UsageError(
        f"no rung of the memory ladder fits in {card / 2**30:g} GiB with {(host or 0) / 2**30:g} GiB of host"
        " memory",
        where="--fit",
        expected="room for the weights that products read, one gradient and the loss",
        remedy="give more host memory with --host, shorten --seq-length, or use several cards with fsdp2"
        + (f"; the least here is {least.memory.total / 2**30:.1f} GiB" if least else ""),
    )


def _choices(
    estimates: Callable[[TrainConfig], Memory], config: TrainConfig, step_s: float
) -> Iterator[Rungs]:
    """Every choice that a run of this configuration is not refused for, the one that changes least first."""
    for weights, bits, gradients, offload, kept in itertools.product(
        _WEIGHTS, _BITS, _GRADIENTS, _OFFLOADS, ActivationCheckpointing
    ):
        one = config.model_copy(
            update={
                "memory": config.memory.model_copy(update={"weights": weights, "gradients": gradients}),
                "optimizer": config.optimizer.model_copy(update={"state_bits": bits}),
                "parallel": config.parallel.model_copy(update={"offload": offload}),
                "compute": config.compute.model_copy(update={"activation_checkpointing": kept}),
            }
        )
        try:
            check_settings(one, world_size=1)
        except AprDistError:
            continue
        memory = estimates(one)
        yield Rungs(config=one, memory=memory, seconds=_RECOMPUTED[kept] * step_s + _moved_s(memory))


def _moved_s(memory: Memory) -> float:
    """Seconds in which what is in host memory goes there or back once a step, in the slower direction.

    Gradients leave and come back; low bits, moments and block inputs come and leave.
    """
    return _kept_on_host(memory) / LINK_BYTES_S


def _kept_on_host(memory: Memory) -> int:
    """Bytes that have to be there; a save is written from copies only where they fit."""
    return sum(size for part, size in memory.host_parts.items() if part != "copies of a save")


def lines_of(chosen: Rungs, before: Memory, *, step_s: float) -> Iterator[str]:
    """The choice as text: keys, bytes and seconds."""
    memory = chosen.memory
    yield (
        f"{memory.total / 2**30:.2f} GiB on the card at the {memory.moment},"
        f" {_kept_on_host(memory) / 2**30:.2f} GiB on the host"
    )
    yield f"as configured: {before.total / 2**30:.2f} GiB"
    yield f"a step: {step_s:.2f} s of arithmetic, at most {chosen.seconds:.2f} s of recomputing and moving"
    for key, value in chosen.keys.items():
        yield f"  {key}: {value}"
