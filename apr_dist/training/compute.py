"""How the network of a run is computed: checkpointing, compiled blocks and z-loss, as the keys say."""

from __future__ import annotations

import os
import shutil

import torch

from apr_dist.config import TrainConfig
from apr_dist.config_sections import Compile, Documents, Precision
from apr_dist.errors import UsageError
from apr_dist.model.checkpointing import Checkpointing
from apr_dist.model.packing import packed_kernel
from apr_dist.model.transformer import Decoder


def set_up_compute(model: Decoder, config: TrainConfig, device: torch.device) -> None:
    """Make the decoder compute as ``compute`` says; compiled code is made at the first call.

    What a block checkpoints is inside what is compiled, and both are inside the block's call, around
    which FSDP2 and ZeRO-3 gather its weights: any of them goes with any other.

    Raises:
        UsageError: compiling was asked for on a machine that cannot.
    """
    options = config.compute
    model.set_checkpointing(Checkpointing(options.activation_checkpointing.value))
    model.z_loss = options.z_loss
    if options.compile is Compile.BLOCK:
        _assert_can_compile(device)
        model.compile_blocks()


def describe_compute(config: TrainConfig, device: torch.device) -> str:
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
    if config.loader.documents is Documents.ISOLATE:
        parts.append(f"documents isolated by {packed_kernel(device, dtype)}")
    return ", ".join(parts)


def _assert_can_compile(device: torch.device) -> None:
    compiler = os.environ.get("CXX", "c++")
    if device.type == "cpu" and shutil.which(compiler) is None and shutil.which("g++") is None:
        raise UsageError(
            f"compute.compile is block and the C++ compiler {compiler} is not there",
            where="--compute.compile",
            expected="a C++ compiler on the path, which PyTorch compiles for the CPU with",
            remedy="install g++ or name a compiler in CXX, or use --compute.compile off",
        )
