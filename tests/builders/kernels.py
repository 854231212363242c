"""Every set of kernels that this machine can compute with, each a place to put a decoder and its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import pytest
import torch
from torch import nn

from apr_dist.choices import KernelChoice
from apr_dist.model.kernels import cpu_attention, products
from apr_dist.model.kernels.choice import SETS
from apr_dist.model.kernels.plain import Kernels
from apr_dist.model.kernels.products import MatmulBackend, cpu_matmul_backend
from apr_dist.model.layers import Computed

M = TypeVar("M", bound=nn.Module)

ONEDNN = "cpu-onednn"
"""The CPU's set as it is on processors where oneDNN multiplies, with its own attention at any length."""

CASES: list[str] = [KernelChoice.PLAIN, KernelChoice.CPU, ONEDNN]
CASES += [KernelChoice.CUDA] if torch.cuda.is_available() else []


@dataclass(frozen=True)
class KernelCase:
    """A set of kernels and the device it is tested on."""

    name: str
    kernels: Kernels
    device: torch.device

    def put(self, module: M) -> M:
        """The module, there, computed by that set alone."""
        module.to(self.device)
        for part in module.modules():
            if isinstance(part, Computed):
                part.kernels = self.kernels
        return module


@contextmanager
def kernel_case(name: str) -> Iterator[KernelCase]:
    """One of `CASES`; skipped where this PyTorch has no oneDNN."""
    with pytest.MonkeyPatch.context() as patch:
        if name == ONEDNN:
            patch.setattr(cpu_attention, "LEAST_LENGTH", 1)
        if name in (KernelChoice.CPU, ONEDNN):
            backend = MatmulBackend.ONEDNN if name == ONEDNN else MatmulBackend.TORCH
            patch.setenv(products.BACKEND_VARIABLE, backend)
            cpu_matmul_backend.cache_clear()
            if cpu_matmul_backend() is not backend:
                pytest.skip("this PyTorch has no oneDNN")
        choice = KernelChoice.CPU if name == ONEDNN else KernelChoice(name)
        device = "cuda" if choice is KernelChoice.CUDA else "cpu"
        try:
            yield KernelCase(name, SETS[choice], torch.device(device))
        finally:
            cpu_matmul_backend.cache_clear()
