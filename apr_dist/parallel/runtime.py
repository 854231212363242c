"""The processes of one run: who they are, that they are the ones asked for, and how they agree.

Everything a rank tells another travels as JSON or as tensors; no object is pickled. Here are the
Accelerator and rank helpers; how weights travel is in ``weights``, what ends all ranks because of one
in ``watch``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from apr_dist.choices import GradientStorage, Offload, Precision, Strategy, WeightStorage
from apr_dist.cores import usable_cores
from apr_dist.errors import AprDistError, DistributedError, UsageError
from apr_dist.parallel.heartbeat import HERE
from apr_dist.parallel.launch import read_launch
from apr_dist.parallel.meeting import meeting
from apr_dist.parallel.storage import PLAIN, Storage
from apr_dist.parallel.strategy import (
    NOT_AS_ASKED,
    check_strategy,
    forget_launcher_s,
    group_size,
    prepare_for_deepspeed,
)

_DISTRIBUTED_TYPES = {
    False: (DistributedType.NO,),
    True: (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU),
}
"""What Accelerate may report, by whether there are several processes. It only joins them: sharding is
done in ``sharding`` and ``zero``, because Accelerate turns it off in silence on CPU."""


@dataclass(frozen=True)
class Runtime:
    """One rank's view of the run; ``shard_size`` ranks together hold one copy of the parameters."""

    accelerator: Accelerator
    strategy: Strategy
    rank: int
    world_size: int
    shard_size: int
    device: torch.device
    cpu_threads: int
    offload: Offload = Offload.NONE
    storage: Storage = PLAIN

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that reads models and writes files."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum of a tensor over all ranks, in place; returns it."""
        if self.world_size > 1:
            HERE.moved()
            dist.all_reduce(values, op=dist.ReduceOp.SUM)
        HERE.moved()
        return values

    def broadcast(self, values: torch.Tensor) -> torch.Tensor:
        """Rank 0's values in every rank's tensor, in place; returns it."""
        if self.world_size > 1:
            HERE.moved()
            dist.broadcast(values, src=0)
        HERE.moved()
        return values

    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's JSON value, on every rank."""
        HERE.moved()
        if self.world_size == 1:
            return value
        payload = json.dumps(value).encode() if self.is_main else b""
        length = torch.tensor([len(payload)], dtype=torch.int64, device=self.device)
        dist.broadcast(length, src=0)
        buffer = torch.zeros(int(length.item()), dtype=torch.uint8, device=self.device)
        if self.is_main:
            buffer.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        dist.broadcast(buffer, src=0)
        HERE.moved()
        return json.loads(bytes(buffer.cpu().numpy()))

    def agree(self, error: AprDistError | None) -> None:
        """Let every rank know of rank 0's error, so that all of them raise it together."""
        fields = self.broadcast_json(None if error is None else error.to_fields())
        if fields is not None:
            raise error if error is not None else AprDistError.from_fields(fields)

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Run ``work`` on rank 0 and hand its JSON result, or its error, to every rank.

        Raises:
            AprDistError: what ``work`` raised, on all ranks alike.
        """
        result, error = None, None
        if self.is_main:
            try:
                result = work()
            except AprDistError as raised:
                error = raised
        self.agree(error)
        return self.broadcast_json(result)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        HERE.moved()
        if self.world_size > 1:
            dist.barrier()


def _replicas() -> DistributedDataParallelKwargs:
    """How DDP sends: gradients are views of its buckets, one copy of them less; buffers never change."""
    return DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)


def start(
    *,
    device: str,
    strategy: str,
    precision: str,
    cpu_threads: int | None,
    timeout_s: float,
    shard_size: int | None = None,
    offload: str = "none",
    state_bits: int = 32,
    weights: WeightStorage = WeightStorage.F32,
    gradients: GradientStorage = GradientStorage.F32,
) -> Runtime:
    """Join the launched processes and prove that they are the ones that were asked for.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        strategy: ``auto`` or one of `Strategy`.
        precision: ``f32`` or ``bf16``.
        cpu_threads: threads per process on CPU; None divides the cores among local processes.
        timeout_s: longest a collective may wait, in seconds.
        shard_size: ranks that share one copy of the parameters under ``hsdp``; None: those of one machine.
        offload: what lies in host memory: a value of `Offload`.
        state_bits: bits of the optimizer's moments, 8 or 32.
        weights: how trained matrices are stored.
        gradients: how their gradients are.

    Raises:
        UsageError: CUDA was asked for and there is none, the shard size does not fit, or the strategy
            cannot offload that or has no moments in 8 bits.
        DistributedError: not all processes came, or the world size or strategy that is active is not the
            wanted one.
    """
    use_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "device is cuda and PyTorch finds no CUDA device",
            where="--device",
            expected="a visible CUDA device",
            remedy="use --device cpu, or check the driver with nvidia-smi",
        )
    launch = read_launch()
    storage = Storage(weights=weights, gradients=gradients, offload=Offload(offload))
    wanted = check_strategy(
        strategy,
        world=launch.world_size,
        per_machine=launch.local_world_size,
        shard_size=shard_size,
        storage=storage,
        precision=Precision(precision),
        state_bits=state_bits,
    )
    forget_launcher_s(launch.world_size)
    if wanted.zero_stage:
        prepare_for_deepspeed(use_cpu=use_cpu, offload=Offload(offload))
    backend = "gloo" if use_cpu else "cuda:nccl,cpu:gloo"
    limits = InitProcessGroupKwargs(backend=backend, timeout=timedelta(seconds=timeout_s))
    with meeting(launch, timeout_s):
        _join_after_restart(backend, timeout_s)
        accelerator = Accelerator(
            cpu=use_cpu,
            mixed_precision="bf16" if precision == "bf16" else "no",
            kwargs_handlers=[limits, _replicas()] if launch.world_size > 1 else [],
            step_scheduler_with_optimizer=False,
        )
    threads = _set_threads(cpu_threads)
    _assert_as_asked(accelerator, wanted)
    return Runtime(
        accelerator=accelerator,
        strategy=wanted,
        shard_size=group_size(wanted, launch.world_size, shard_size, launch.local_world_size),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        # Accelerate numbers the CPU by rank; tensors do not, and would be copied to reach what is the same.
        device=torch.device("cpu") if use_cpu else accelerator.device,
        cpu_threads=threads,
        offload=Offload(offload),
        storage=storage,
    )


def _join_after_restart(backend: str, timeout_s: float) -> None:
    """Join the processes apart from what earlier attempts of this launch left in the launcher's store.

    torchrun keeps one store over its restarts, with the addresses of ranks that are gone under the keys that
    the new ones use. Whoever reads such an address waits for, or is refused by, a process that is dead.
    """
    attempt = read_launch().restarts
    if attempt == 0 or read_launch().world_size == 1 or dist.is_initialized():
        return
    limit = timedelta(seconds=timeout_s)
    store, rank, world_size = next(rendezvous("env://", timeout=limit))
    dist.init_process_group(
        backend,
        store=PrefixStore(f"attempt-{attempt}", store),
        rank=rank,
        world_size=world_size,
        timeout=limit,
    )


def assert_wrapped(model: nn.Module, strategy: Strategy) -> None:
    """Prove that the prepared model carries the strategy, not only the Accelerator's word for it.

    Raises:
        DistributedError: naming the wrapper found and the one expected.
    """
    is_ddp = isinstance(model, nn.parallel.DistributedDataParallel)
    if is_ddp != (strategy is Strategy.DDP):
        raise DistributedError(
            f"the model is wrapped as {type(model).__name__} under strategy {strategy}",
            expected="DistributedDataParallel" if strategy is Strategy.DDP else "the bare decoder",
            remedy="launch with accelerate launch or torchrun, and check parallel.strategy",
            falsifier=NOT_AS_ASKED,
        )


def shut_down(code: int) -> None:
    """End this process with ``code``; after a failure without waiting for any rank.

    A multi-process run leaves through ``os._exit`` once everything is flushed: gloo's threads can
    otherwise abort a finished interpreter, and the launcher would call a good run failed.
    """
    several = dist.is_available() and dist.is_initialized()
    gc.collect()
    if several and code == 0:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    if several:
        os._exit(code)
    sys.exit(code)


def reset_state() -> None:
    """Forget Accelerate's process-wide state, so that one process can start a second run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


def _set_threads(cpu_threads: int | None) -> int:
    # Launchers export OMP_NUM_THREADS=1 even for a single process, which halves a 2-core machine.
    local = read_launch().local_world_size
    threads = cpu_threads if cpu_threads is not None else max(1, usable_cores() // local)
    torch.set_num_threads(threads)
    return threads


def _assert_as_asked(accelerator: Accelerator, wanted: Strategy) -> None:
    world = read_launch().world_size
    if accelerator.num_processes != world:
        raise DistributedError(
            f"the launcher started {world} processes and {accelerator.num_processes} joined",
            expected=f"{world} processes in one group",
            remedy="launch with torchrun or accelerate launch --multi_gpu; on CPU, ACCELERATE_USE_CPU=true",
            falsifier=NOT_AS_ASKED,
        )
    if accelerator.distributed_type not in _DISTRIBUTED_TYPES[world > 1]:
        raise DistributedError(
            f"{accelerator.distributed_type.value} over {world} process(es) is active",
            expected=f"strategy {wanted}",
            remedy="start as many processes as the strategy needs, or set parallel.strategy to auto",
            falsifier=NOT_AS_ASKED,
        )
