"""The choice of a set of kernels: the only place in the model that asks for the device or the compiler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from apr_dist.choices import KernelChoice
from apr_dist.errors import UsageError
from apr_dist.model.kernels.cpu import CpuKernels
from apr_dist.model.kernels.cuda import CudaKernels
from apr_dist.model.kernels.plain import Kernels

SETS: Final[Mapping[KernelChoice, Kernels]] = {
    KernelChoice.PLAIN: Kernels(),
    KernelChoice.CPU: CpuKernels(),
    KernelChoice.CUDA: CudaKernels(),
}


def kernels_on(device: torch.device, *, compiled: bool = False) -> Kernels:
    """The set made for a device; for compiled code on the CPU the plain one, which the compiler can read."""
    if device.type == "cuda":
        return SETS[KernelChoice.CUDA]
    own = device.type == "cpu" and not compiled and not torch.compiler.is_compiling()
    return SETS[KernelChoice.CPU if own else KernelChoice.PLAIN]


def available(device: torch.device) -> list[KernelChoice]:
    """The sets that can compute on a device."""
    return [KernelChoice.PLAIN, *(one for one in SETS if one.value == device.type)]


def choose_kernels(choice: KernelChoice, device: torch.device, *, compiled: bool = False) -> Kernels | None:
    """The set that a configuration asks for; None: that of each tensor's device (`kernels_on`).

    Args:
        choice: what is asked for.
        device: where the decoder computes.
        compiled: whether its blocks are compiled.

    Raises:
        UsageError: the set cannot compute there.
    """
    if choice is KernelChoice.AUTO:
        return None
    possible = available(device)
    if compiled and KernelChoice.CPU in possible:
        possible.remove(KernelChoice.CPU)
    if choice not in possible:
        blocks = " in compiled blocks" if compiled and choice.value == device.type else ""
        raise UsageError(
            f"compute.kernels is {choice}, which does not run on {device.type}{blocks}",
            where="--compute.kernels",
            expected=" or ".join([KernelChoice.AUTO, *possible]),
            remedy="use --compute.kernels auto, which takes the fastest set that runs here",
        )
    return SETS[choice]
