"""Matrix products on the CPU, and which library computes those in f32, decided in one place.

On x86 PyTorch hands f32 products to MKL, which uses its AVX2 kernels on processors that are not
Intel's, even where AVX-512 is there: half the arithmetic the machine can do. oneDNN, which every
PyTorch build for x86 carries, uses AVX-512 on any vendor. The choice is a function of the processor
alone, never of a timing, so a run on the same machine always computes the same bits. Products in
other types go to ``torch`` as they are.
"""

from __future__ import annotations

import functools
import os
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from apr_dist.errors import UsageError

BACKEND_VARIABLE = "APR_DIST_CPU_MATMUL"
"""Environment variable that overrides the choice: ``torch`` or ``onednn``."""


class MatmulBackend(StrEnum):
    """Who multiplies f32 matrices on the CPU."""

    TORCH = "torch"
    ONEDNN = "onednn"


@functools.cache
def cpu_matmul_backend() -> MatmulBackend:
    """The backend of this process; constant for its life.

    Raises:
        UsageError: the environment variable names no backend.
    """
    chosen = os.environ.get(BACKEND_VARIABLE)
    if chosen is not None:
        if chosen not in list(MatmulBackend):
            raise UsageError(f"{BACKEND_VARIABLE} is {chosen!r}", expected=" or ".join(MatmulBackend))
        return MatmulBackend(chosen) if _onednn_is_there() else MatmulBackend.TORCH
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return MatmulBackend.ONEDNN if wide and not _is_intel() and _onednn_is_there() else MatmulBackend.TORCH


def uses_onednn(tensor: Tensor) -> bool:
    """Whether products of this tensor go through oneDNN directly."""
    return tensor.dtype is torch.float32 and cpu_matmul_backend() is MatmulBackend.ONEDNN


def mm(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` for matrices ``[m, k]`` and ``[k, n]`` of any strides; not differentiable."""
    return linear(left, right.t())


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``rows @ weight.T + bias`` for ``[m, k]`` and ``[n, k]`` of any strides; not differentiable."""
    if uses_onednn(rows) and rows.shape[0] > 0:
        if rows.stride(0) == 1 and rows.stride(1) > rows.shape[0]:
            rows = rows.t().contiguous().t()  # columns far apart in memory are slow there
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
        return product
    return torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())


def _onednn_is_there() -> bool:
    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _is_intel() -> bool:
    info = Path("/proc/cpuinfo")
    return not info.exists() or "GenuineIntel" in info.read_text(encoding="ascii", errors="replace")
