"""Which strategy a run has: what the launcher asked for, what it can do, and what the machine must offer.

Whether the strategy is really active is proven by ``runtime``, ``sharding`` and ``engine``.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from pathlib import Path

from apr_dist.choices import Offload, Precision, Strategy, StrategyChoice
from apr_dist.errors import DistributedError, UsageError
from apr_dist.parallel.state_bits import refuse_state_bits
from apr_dist.parallel.storage import Storage, refuse_storage

GPUS_PER_MACHINE = 8

NOT_AS_ASKED = "FALSIFY-APR-DIST-DISTRIBUTED-001"
"""Falsifier of every refusal of processes or a strategy that are not the ones asked for."""


def possible_offloads(strategy: Strategy) -> list[Offload]:
    """What the strategy can keep in host memory, the least first."""
    possible = [Offload.NONE]
    if strategy.zero_stage or strategy in {Strategy.SINGLE, Strategy.DDP}:
        possible.append(Offload.OPTIMIZER)
    if strategy.is_fsdp or strategy is Strategy.ZERO3:
        possible.append(Offload.OPTIMIZER_AND_PARAMETERS)
    return possible


def refuse_offload(strategy: Strategy, offload: Offload) -> None:
    """Offload only what the strategy can keep in host memory.

    Raises:
        UsageError: naming what the strategy can.
    """
    possible = possible_offloads(strategy)
    if offload not in possible:
        raise UsageError(
            f"parallel.offload is {offload} under strategy {strategy}",
            expected=f"one of {', '.join(possible)}",
            remedy="optimizer needs single, ddp, zero1, zero2 or zero3; optimizer+parameters needs zero3,"
            " fsdp2, shard-grad-op or hsdp",
        )


def refuse_world(strategy: Strategy, world: int) -> None:
    """As many processes as the strategy is for: one for single, several for every other.

    Raises:
        DistributedError: naming both.
    """
    if (strategy is Strategy.SINGLE) == (world > 1):
        raise DistributedError(
            f"strategy {strategy} over {world} process(es)",
            expected="one process for single, several for every other strategy",
            remedy="start as many processes as the strategy needs, or set parallel.strategy to auto",
            falsifier=NOT_AS_ASKED,
        )


def check_strategy(
    asked: str,
    *,
    world: int,
    per_machine: int | None,
    shard_size: int | None,
    storage: Storage,
    precision: Precision,
    state_bits: int,
) -> Strategy:
    """The strategy that runs, once it is known to do everything that is asked of it.

    Args:
        asked: ``auto`` or one of `Strategy`.
        world: processes in all.
        per_machine: processes of one machine; None: not known yet.
        shard_size: ranks that share one copy of the parameters under ``hsdp``.
        storage: how trained tensors are stored, and what is in host memory.
        precision: compute type.
        state_bits: bits of the optimizer's moments, 8 or 32.

    Raises:
        UsageError: it cannot offload that, has no moments in 8 bits, or the shard size does not fit.
        DistributedError: the launcher asks for another one, or it is not for so many processes.
    """
    strategy = choose(asked, world)
    refuse_offload(strategy, storage.offload)
    refuse_state_bits(strategy, storage.offload, state_bits)
    refuse_storage(strategy, storage, precision)
    refuse_world(strategy, world)
    group_size(strategy, world, shard_size, per_machine)
    return strategy


def named(asked: str, world: int) -> Strategy:
    """The strategy of that name; ``auto`` is single for one process, else DDP."""
    if asked == StrategyChoice.AUTO:
        return Strategy.SINGLE if world == 1 else Strategy.DDP
    return Strategy(asked)


def choose(asked: str, world: int) -> Strategy:
    """The strategy to run: the one asked for, else the one the launcher's own configuration names.

    Raises:
        DistributedError: both name a strategy, and not the same one.
    """
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    launched = None
    if fsdp:
        reshards = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
        launched = Strategy.FSDP2 if reshards else Strategy.SHARD_GRAD_OP
    elif deepspeed:
        launched = Strategy(f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}")
    wanted = named(asked, world)
    if asked == StrategyChoice.AUTO:
        return (launched if world > 1 else None) or wanted  # one process has nothing to shard over
    if launched is not None and launched is not wanted and not (fsdp and wanted.is_fsdp):
        raise DistributedError(
            f"the launcher's configuration says {launched} and parallel.strategy says {wanted}",
            expected="one strategy",
            remedy="set parallel.strategy to auto, or launch with a configuration that names no strategy",
            falsifier=NOT_AS_ASKED,
        )
    return wanted


def refuse_launched_precision(precision: str) -> None:
    """Compare the launcher's precision with the run's.

    ``accelerate launch --mixed_precision`` says it in the environment; its default, ``no``, says nothing.

    Raises:
        UsageError: the launcher asks for another precision than ``parallel.precision``.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched in ("no", precision):
        return
    known = launched == "bf16"
    raise UsageError(
        f"the launcher asks for mixed precision {launched} and parallel.precision is {precision}",
        where="accelerate launch --mixed_precision",
        expected="one precision" if known else "bf16 or f32, which is what this trainer computes in",
        remedy=f"add --parallel.precision {launched}, or leave --mixed_precision out"
        if known
        else "leave --mixed_precision out, or use bf16 there and --parallel.precision bf16",
    )


def forget_launcher_s(world: int) -> None:
    """Remove from the environment what would make Accelerate build something else than the strategy.

    Accelerate would build its own FSDP or DeepSpeed plugin, which are not used. It would also join a
    process group of one, and wrap the model in DDP, for the only process of a launcher.

    Args:
        world: processes in all.
    """
    names = ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"]
    for name in [*names, "LOCAL_RANK"] if world == 1 else names:
        os.environ.pop(name, None)


def group_size(strategy: Strategy, world: int, asked: int | None, per_machine: int | None = None) -> int:
    """How many ranks together hold one copy of the parameters.

    Under ``hsdp`` those of one machine, of which there are ``GPUS_PER_MACHINE`` where nobody knows better.

    Raises:
        UsageError: a size was asked for that does not divide the world, or without hsdp.
    """
    if strategy is not Strategy.HSDP:
        if asked is not None:
            raise UsageError(
                f"parallel.shard_size is {asked} under strategy {strategy}",
                expected="no such key: only hsdp has groups of ranks",
                remedy="remove it, or use --parallel.strategy hsdp",
            )
        return world if strategy.shards_parameters else 1
    size = asked or per_machine or min(world, GPUS_PER_MACHINE)
    if world % size:
        raise UsageError(
            f"{world} processes do not divide into groups of {size}",
            where="--parallel.shard-size",
            expected=f"a divisor of {world}",
            remedy="give a number of processes that each hold one part of the parameters",
        )
    return size


def prepare_for_deepspeed(*, use_cpu: bool, offload: Offload) -> None:
    """Let DeepSpeed find the device and its build tools; call before the first process group.

    Raises:
        DistributedError: DeepSpeed builds a module (for CPU ranks to communicate, for an offloaded
            optimizer to update), and there is no C++ compiler.
    """
    old_names = r".*(all_gather_into|reduce_scatter)_tensor.*"  # which DeepSpeed still calls
    warnings.filterwarnings("ignore", message=old_names, category=FutureWarning)
    if use_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    elif offload is Offload.NONE:
        return
    if shutil.which("ninja") is None:  # installed beside this Python, whose folder need not be on the path
        os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    compiler, purpose = os.environ.get("CXX", "c++"), "CPU ranks" if use_cpu else "offloading"
    if shutil.which(compiler) is None:
        raise DistributedError(
            f"DeepSpeed builds a module for {purpose}, and the C++ compiler {compiler} is not there",
            expected="a C++ compiler on the path",
            remedy="install g++ or name a compiler in CXX, or use --parallel.strategy fsdp2",
        )
