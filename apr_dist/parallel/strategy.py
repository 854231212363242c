"""Which strategy a run has: what the launcher asked for, what it can do, and what the machine must offer.

Whether the strategy is really active is proven by ``runtime``, ``sharding`` and ``engine``.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from pathlib import Path

from apr_dist.choices import Offload, Strategy
from apr_dist.errors import DistributedError, UsageError
from apr_dist.parallel.launch import read_launch

NOT_AS_ASKED = "FALSIFY-APR-DIST-DISTRIBUTED-001"
"""Falsifier of every refusal of processes or a strategy that are not the ones asked for."""


def possible_offloads(strategy: Strategy) -> list[Offload]:
    """What the strategy can keep in host memory, the least first."""
    possible = [Offload.NONE]
    if strategy.zero_stage:
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
            remedy="optimizer needs zero1, zero2 or zero3; optimizer+parameters needs zero3, fsdp2,"
            " shard-grad-op or hsdp",
        )


def choose(asked: str) -> Strategy:
    """The strategy to run: the one asked for, else the one the launcher's own configuration names.

    ``accelerate launch`` with an FSDP or DeepSpeed configuration says so in the environment, from where
    Accelerate would build its own plugins; those are not used, so what it says is taken out.

    Raises:
        DistributedError: both name a strategy, and not the same one.
    """
    fsdp = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
    deepspeed = os.environ.pop("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    launched = None
    if fsdp:
        reshards = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
        launched = Strategy.FSDP2 if reshards else Strategy.SHARD_GRAD_OP
    elif deepspeed:
        launched = Strategy(f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}")
    if asked == "auto":
        alone = Strategy.SINGLE if read_launch().world_size == 1 else Strategy.DDP
        return launched or alone
    wanted = Strategy(asked)
    if launched is not None and launched is not wanted and not (fsdp and wanted.is_fsdp):
        raise DistributedError(
            f"the launcher's configuration says {launched} and parallel.strategy says {wanted}",
            expected="one strategy",
            remedy="set parallel.strategy to auto, or launch with a configuration that names no strategy",
            falsifier=NOT_AS_ASKED,
        )
    return wanted


def group_size(strategy: Strategy, world: int, asked: int | None) -> int:
    """How many ranks together hold one copy of the parameters.

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
    size = asked if asked is not None else read_launch().local_world_size
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
