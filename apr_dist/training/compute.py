"""How the network of a run is computed: kernels, checkpointing, compiled blocks and z-loss."""

from __future__ import annotations

import os
import shutil

import torch

from apr_dist.choices import Compile, Documents, Precision
from apr_dist.config import TrainConfig
from apr_dist.config.sections import ComputeSection, RouterSection
from apr_dist.errors import UsageError
from apr_dist.model.host_memory import keep_freed_memory
from apr_dist.model.kernels.choice import choose_kernels, kernels_on
from apr_dist.model.kernels.plain import Kernels
from apr_dist.model.transformer import Decoder
from apr_dist.parallel.runtime import Runtime


def set_up_compute(model: Decoder, options: ComputeSection, device: torch.device) -> None:
    """Make the decoder compute as the section says; compiled code is made at the first call.

    What a block checkpoints is inside what is compiled, and both are inside the block's call, around
    which FSDP2 and ZeRO-3 gather its weights: any of them goes with any other.

    Raises:
        UsageError: kernels or compiling were asked for that cannot be had here.
    """
    compiled = options.compile is Compile.BLOCK
    model.use_kernels(choose_kernels(options.kernels, device, compiled=compiled))
    model.set_checkpointing(options.activation_checkpointing)
    model.z_loss = options.z_loss
    if compiled:
        _assert_can_compile(device)
        model.compile_blocks()


def set_up_routers(model: Decoder, options: RouterSection, runtime: Runtime) -> str | None:
    """Give a mixture's routers their losses; what they are in one line, None for a dense model."""
    routing = model.routing
    if routing is None:
        return None
    own = model.config.router_aux_loss_coef
    routing.balance = own if options.aux_loss is None else options.aux_loss
    routing.z_loss, routing.total = options.z_loss, runtime.sum
    stated = " (the model's)" if options.aux_loss is None else ""
    return (
        f"{routing.experts} experts a block, {routing.each} a token, none is ever dropped;"
        f" load-balancing loss x {routing.balance:g}{stated}, router z-loss x {routing.z_loss:g}"
    )


def set_up_machine(config: TrainConfig, runtime: Runtime, *, conversations: bool = False) -> str:
    """Let a CPU process keep the memory it frees, and say in one line where and how the run computes.

    Args:
        config: the resolved configuration.
        runtime: this rank's view of the run.
        conversations: whether the data has any, which are isolated from each other.
    """
    how = _kernels(config.compute, runtime.device).describe(z_loss=config.compute.z_loss)
    if runtime.device.type == "cpu":
        kept = "kept" if keep_freed_memory() else "returned"
        how += f", freed memory {kept}, {runtime.cpu_threads} thread(s) each"
    if config.optimizer.state_bits == 8:
        how += ", AdamW's state in 8 bits"
    if described := _choices(config, runtime.device, conversations=conversations):
        how += f", {described}"
    return (
        f"{runtime.device} as {runtime.strategy} over {runtime.world_size} process(es),"
        f" {config.parallel.precision}; {how}"
    )


def _choices(config: TrainConfig, device: torch.device, *, conversations: bool) -> str:
    """The choices that are not the default, for one line; empty when there is none."""
    options = config.compute
    dtype = torch.bfloat16 if config.parallel.precision is Precision.BF16 else torch.float32
    parts = []
    if options.compile is not Compile.OFF:
        parts.append("blocks compiled")
    if options.activation_checkpointing.value != "off":
        parts.append(f"checkpointing {options.activation_checkpointing}")
    if options.z_loss:
        parts.append(f"z-loss {options.z_loss:g}")
    isolated = ["documents"] if config.loader.documents is Documents.ISOLATE else []
    isolated += ["conversations"] if conversations else []
    if isolated:
        by = _kernels(config.compute, device).isolation(device, dtype)
        parts.append(f"{' and '.join(isolated)} isolated by {by}")
    return ", ".join(parts)


def _kernels(options: ComputeSection, device: torch.device) -> Kernels:
    """The set that computes the run; what is compiled on the CPU is the plain one's."""
    compiled = options.compile is Compile.BLOCK
    return choose_kernels(options.kernels, device, compiled=compiled) or kernels_on(device)


def _assert_can_compile(device: torch.device) -> None:
    compiler = os.environ.get("CXX", "c++")
    if device.type == "cpu" and shutil.which(compiler) is None and shutil.which("g++") is None:
        raise UsageError(
            f"compute.compile is block and the C++ compiler {compiler} is not there",
            where="--compute.compile",
            expected="a C++ compiler on the path, which PyTorch compiles for the CPU with",
            remedy="install g++ or name a compiler in CXX, or use --compute.compile off",
        )
