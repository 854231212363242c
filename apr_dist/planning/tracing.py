"""A training step on fake tensors: the session's own decoder, optimizer and engine, and what they would hold.

PyTorch's `FakeTensorMode` computes shapes and types alone, so a model of any size is traced on any machine,
on an imagined GPU; its `MemTracker` adds up what is alive at each moment, by device. FSDP2 is traced as rank
0 of a fake process group of any size, whose collectives do nothing. What depends on a value is given the
usual answer: the step is taken, and no weight lies on a tie.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.weak import WeakIdKeyDictionary

from apr_dist.choices import KernelChoice, Precision
from apr_dist.config import TrainConfig
from apr_dist.gates.adapters import adapter_of
from apr_dist.model.config import TransformerConfig
from apr_dist.model.kernels import grouped
from apr_dist.model.kernels.choice import SETS
from apr_dist.model.kernels.cuda import CudaKernels
from apr_dist.model.quantized import quantized_layers
from apr_dist.parallel import engine as engines
from apr_dist.parallel import sharding
from apr_dist.parallel.eight_bit import Quantized, code_values
from apr_dist.parallel.gradients import Gradients
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.sharded import held_here
from apr_dist.parallel.sharding import build_decoder
from apr_dist.parallel.split_weights import split_of
from apr_dist.parallel.storage import Storage
from apr_dist.parallel.stored_adamw import StoredAdamW
from apr_dist.parallel.strategy import group_size, named
from apr_dist.training.optimizer import build_optimizer

GPU, HOST = torch.device("cpu"), torch.device("meta")
"""Fake tensors of a GPU need one for their backward, so others stand for it and for host memory."""


@dataclass(frozen=True, kw_only=True)
class Traced:
    """Bytes of one process.

    Attributes:
        weights: of the parameters.
        low: of the bits that split weights lost.
        gradients: when backward is done.
        optimizer: both moments.
        on_host: of ``low``, ``gradients`` and ``optimizer``, what is in host memory.
        peak: the most that was alive on the GPU.
        host_peak: the most that was alive in host memory.
    """

    weights: int
    low: int
    gradients: int
    optimizer: int
    on_host: int
    peak: int
    host_peak: int


class _Totals(MemTracker):  # type: ignore[no-untyped-call]
    """Adds up all tensors; the base class would also update figures of every module at every operation."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        modules, self.memory_tracking = self.memory_tracking, WeakIdKeyDictionary()
        try:
            super()._update_peak_stats(peak_state)
        finally:
            self.memory_tracking = modules


def trace(model: TransformerConfig, config: TrainConfig, *, world_size: int = 1) -> Traced:
    """Two steps of one process on an imagined GPU.

    Args:
        model: the decoder.
        config: batch sizes, precision, and the rungs of the memory ladder.
        world_size: processes; several under FSDP2 alone.
    """
    with _group(world_size):
        return _traced(model, config, world_size)


def _traced(model: TransformerConfig, config: TrainConfig, world_size: int) -> Traced:
    micro = config.micro_batch(world_size)
    # Made of values, so before there are none.
    runtime = _runtime(config, world_size)
    mesh = sharding._mesh(runtime) if world_size > 1 else None
    if config.optimizer.state_bits == 8:
        for signed in (True, False):  # kept from here on, with their values
            code_values(signed=signed)
    spread = mock.patch.object(sharding, "_mesh", return_value=mesh)
    with _imagined(), spread, FakeTensorMode(allow_non_fake_inputs=True):
        decoder = build_decoder(model, runtime, adapter_of(config.adapter, model))
        decoder.use_kernels(SETS[KernelChoice.CUDA])
        decoder.set_checkpointing(config.compute.activation_checkpointing)
        options = config.optimizer
        optimizer = build_optimizer(
            decoder,
            lr=config.peak_lr,
            weight_decay=options.weight_decay,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            alone=world_size == 1,
            state_bits=options.state_bits,
            runtime=runtime,
        )
        engine = engines.prepare(decoder, optimizer, runtime, micro_batch=micro, grad_clip=options.grad_clip)
        if isinstance(optimizer, StoredAdamW):
            for weight in decoder.parameters():
                optimizer.state[weight] = optimizer.blank(weight, updates=0)
        tracker = _Totals()
        frozen = [weight for weight in decoder.parameters() if not weight.requires_grad]
        # It hooks every parameter's gradient, and frozen ones refuse that.
        tracker._param_to_grad_hook_handles.update((weight, (_NoHook(), _NoHook())) for weight in frozen)
        lows = [held.low for weight in decoder.parameters() if (held := split_of(weight)) is not None]
        moments = _moments(optimizer)
        tracker.track_external(decoder, optimizer, *lows, *moments)
        ids = torch.zeros((micro, config.seq_length), dtype=torch.int32, device=GPU)
        targets, hold = ids.long(), torch.zeros((), dtype=torch.bool, device=GPU)
        gradients: list[Tensor] = []
        batches = max(1, config.batch_size // (micro * world_size))
        with tracker:
            for _ in range(1 if isinstance(optimizer, StoredAdamW) else 2):  # the first makes the state
                for number in range(batches):
                    tracker.reset_mod_stats()
                    engine.accumulate(ids, targets, scale=1.0, last=number == batches - 1)
                gradients = _gradients(optimizer)
                kept = sum(map(_bytes, gradients)), sum(_bytes(one) for one in gradients if one.is_meta)
                gradients = []
                _each_kind_once(optimizer)
                engine.step(hold)
        peaks = tracker.get_tracker_snapshot("peak")
        moments = _moments(optimizer)
        return Traced(
            weights=sum(map(_bytes, [*decoder.parameters(), *_scales(decoder)])),
            low=sum(map(_bytes, lows)),
            gradients=kept[0],
            optimizer=sum(map(_bytes, moments)),
            on_host=sum(_bytes(one) for one in [*lows, *moments] if one.is_meta) + kept[1],
            peak=_total(peaks, GPU),
            host_peak=_total(peaks, HOST),
        )


def _each_kind_once(optimizer: torch.optim.Optimizer) -> None:
    """Update one parameter of each shape: those of other blocks take the same memory on their way."""
    if isinstance(optimizer, StoredAdamW):
        find, seen = optimizer.gradient_of, set[tuple[Any, ...]]()

        def first(weight: Tensor) -> Tensor | None:
            eight = isinstance(optimizer.state[weight]["exp_avg"], Quantized)
            kind = (weight.shape, weight.dtype, split_of(weight) is None, eight)
            known = kind in seen
            seen.add(kind)
            return None if known else find(weight)

        optimizer.gradient_of = first


def _rounded_once() -> Any:
    """As `Gradients._summed`, which rounds chunk by chunk: one gradient of each shape, as above."""
    real, seen = Gradients._summed, set[tuple[torch.Size, torch.dtype]]()

    def summed(self: Gradients, new: Tensor, earlier: Tensor | None, key: int) -> Tensor:
        kind = (new.shape, new.dtype)
        if earlier is not None and kind in seen:
            return earlier
        seen.add(kind)
        return real(self, new, earlier, key)

    return summed


def _total(peaks: Any, kind: torch.device) -> int:
    return sum(int(by["Total"]) for device, by in peaks.items() if device.type == kind.type)


class _NoHook:
    """Stands for the hook on a gradient that never comes."""

    def remove(self) -> None:
        """Nothing is to be removed."""


def _scales(decoder: nn.Module) -> list[Tensor]:
    """Of matrices in 4 or 8 bits, what their codes are scaled by."""
    return [one for layer in quantized_layers(decoder).values() for one in layer.stored()[1:]]


def _bytes(tensor: Tensor) -> int:
    here = held_here(tensor)
    return here.numel() * here.element_size()


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    found = getattr(optimizer, "gradient_of", lambda weight: weight.grad)
    return [gradient for weight in weights if (gradient := found(weight)) is not None]


def _moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    found: list[Tensor] = []
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            held = state[key]
            found += [held.codes, held.scales] if isinstance(held, Quantized) else [held]
    return found


@contextlib.contextmanager
def _group(size: int) -> Iterator[None]:
    """A process group of which this is rank 0 and nobody else is there."""
    if size == 1:
        yield
        return
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _runtime(config: TrainConfig, world_size: int) -> Runtime:
    """Rank 0 on the imagined GPU, with what its accelerator would do there."""
    strategy = named(config.parallel.strategy, world_size)
    bf16 = config.parallel.precision is Precision.BF16

    def autocast() -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)

    def prepare_model(model: nn.Module, **_: Any) -> Any:
        forward = model.forward

        def called(*args: Any, **named: Any) -> Any:
            with autocast():
                return forward(*args, **named)

        model.forward = called
        return model

    accelerator = SimpleNamespace(
        autocast=autocast,
        prepare_model=prepare_model,
        no_sync=lambda _: contextlib.nullcontext(),
        mixed_precision="bf16" if bf16 else "no",
    )
    return Runtime(
        accelerator=cast(Accelerator, accelerator),
        strategy=strategy,
        rank=0,
        world_size=world_size,
        shard_size=group_size(strategy, world_size, config.parallel.shard_size),
        device=GPU,
        cpu_threads=1,
        offload=config.parallel.offload,
        storage=Storage(
            weights=config.memory.weights,
            gradients=config.memory.gradients,
            offload=config.parallel.offload,
        ),
    )


@contextlib.contextmanager
def _imagined() -> Iterator[None]:
    """What a GPU without a driver cannot do, and what fake tensors cannot say."""

    def no_places(values: Tensor) -> Tensor:
        return values.new_empty((0, values.dim()), dtype=torch.int64)

    def host_empty(count: int, kind: torch.dtype, **_: Any) -> Tensor:
        return torch.empty(count, dtype=kind, device=HOST)

    def grouped_mm(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """The kernel, which fake tensors know in bf16 alone; else a product that holds as much."""
        bf16 = rows.dtype is torch.bfloat16
        return grouped.grouped_mm(rows, weight, counts) if bf16 else rows @ weight[0].t()

    share = SimpleNamespace(device=torch.device("cuda"), to=lambda kind: torch.ones((), dtype=kind))
    users = ("model.host_copies", "parallel.gradients", "parallel.sharding", "parallel.stored_adamw")
    with contextlib.ExitStack() as stack:
        for user in users:
            stack.enter_context(mock.patch(f"apr_dist.{user}.host_empty", host_empty))
        stack.enter_context(mock.patch.object(Tensor, "__bool__", return_value=False))  # no step is held back
        stack.enter_context(mock.patch.object(engines, "clip_share", return_value=share))
        stack.enter_context(mock.patch.object(engines, "assert_spread", return_value={}))
        stack.enter_context(mock.patch.object(Tensor, "nonzero", no_places))
        stack.enter_context(mock.patch.object(Gradients, "_summed", _rounded_once()))
        stack.enter_context(mock.patch.object(CudaKernels, "has_own_loss", return_value=True))
        stack.enter_context(mock.patch("apr_dist.model.kernels.cuda.has_varlen", return_value=False))
        stack.enter_context(mock.patch("apr_dist.model.kernels.plain.grouped_mm", grouped_mm))
        # A DTensor finds the shapes of results on fake tensors of its own, of which there are none in a run.
        stack.enter_context(
            mock.patch("torch.distributed.tensor._sharding_prop.detect_fake_mode", return_value=None)
        )
        yield
