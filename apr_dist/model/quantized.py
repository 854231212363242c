"""Frozen matrices in 4 or 8 bits: how bitsandbytes stores them, and the linear map that computes with them.

In 4 bits a matrix is nf4 (arXiv:2305.14314): a code for each element, a scale for 64 of them, and the scales
quantised again, 256 to a block. In 8 bits it is int8 with a scale for each row (arXiv:2208.07339). Products
are computed in the compute type with the values that the codes stand for; no activation is quantised.
"""

from __future__ import annotations

import importlib
import logging
import math
import sys
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from apr_dist.errors import DistributedError, WeightsRefused
from apr_dist.model.adapters import Adapter, is_halved
from apr_dist.model.kernels.plain import Kernels, compute_dtype
from apr_dist.model.layers import Computed, Linear

NF4_BLOCK: Final = 64
"""Elements that share a scale in 4 bits: the library's default, which transformers takes too."""

SCALE_BLOCK: Final = 256
"""Scales that share a scale of their own."""

FLAG: Final = "--adapter.base.bits"


@cache
def bitsandbytes(where: str = FLAG) -> Any:
    """The library; with the package ``kernels`` it would fetch others from a hub while it is imported.

    Args:
        where: what needs it, for a refusal.

    Raises:
        DistributedError: it is installed and cannot be imported, or it is not installed.
    """
    told, missing = logging.getLogger("bitsandbytes"), object()
    level, kernels = told.level, sys.modules.get("kernels", missing)
    told.setLevel(logging.ERROR)  # it warns that they are not there
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("bitsandbytes")
    except Exception as error:  # a library of another machine or version raises whatever it likes
        raise DistributedError(
            f"bitsandbytes cannot be imported ({type(error).__name__}: {error})",
            where=where,
            expected="the library that computes 4-bit and 8-bit state",
            remedy="install it again (pip install 'apr-dist[bitsandbytes]'), or use 32 bits",
        ) from error
    finally:
        told.setLevel(level)
        del sys.modules["kernels"]
        if kernels is not missing:
            sys.modules["kernels"] = kernels  # type: ignore[assignment]


def quantize(values: Tensor, bits: int) -> tuple[Tensor, ...]:
    """A matrix as codes and what they are scaled by, in the order of `QuantizedLinear.stored`.

    Args:
        values: f32 ``[out, in]``.
        bits: 4 or 8.

    Raises:
        WeightsRefused: a value is too large for the f16 in which 8-bit scales are found.
    """
    library = bitsandbytes().functional
    if bits == 4:
        codes, state = library.quantize_4bit(
            values, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        outer = state.state2
        return codes.view(-1), state.absmax, outer.absmax, state.offset.view(1), outer.code
    codes, scales, _ = library.int8_vectorwise_quant(values.half(), 0.0)
    if not bool(torch.isfinite(scales).all()):
        raise WeightsRefused(
            "a weight is larger than f16 can be, which 8 bits are made of",
            where=FLAG,
            expected="weights of at most 65,504",
            remedy="use --adapter.base.bits 4, 16 or 32",
        )
    return codes.view(-1), scales


def dequantize(stored: tuple[Tensor, ...], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The matrix ``shape`` that `quantize` made codes of, in a type to compute in."""
    operators = torch.ops.bitsandbytes
    if len(stored) == 2:
        codes, scales = stored
        rows: Tensor = operators.int8_vectorwise_dequant(codes.view(shape), scales)
        return rows.to(dtype)
    codes, scales, outer, mean, table = stored
    widened = operators.dequantize_blockwise(scales, outer, table, SCALE_BLOCK, torch.float32) + mean
    count = math.prod(shape)
    # A row of its own for each block: on the CPU the library (0.50) is wrong where blocks cross rows.
    by_block = (count,) if count % NF4_BLOCK else (count // NF4_BLOCK, NF4_BLOCK)
    matrix: Tensor = operators.dequantize_4bit(codes, widened, NF4_BLOCK, "nf4", by_block, dtype)
    return matrix.view(shape)


class QuantizedLinear(Linear):
    """``y = x W^T + b`` with a frozen ``W``, which is kept in 4 or 8 bits and made again for every product.

    Args:
        like: the map whose place it takes, on the meta device.
        bits: 4 or 8.

    Attributes:
        weight: the codes, flat.
        shape: of the matrix.
    """

    def __init__(self, like: Linear, bits: int) -> None:
        Computed.__init__(self)
        self.in_features, self.out_features, self.bits = like.in_features, like.out_features, bits
        self.shape, self.bias = (like.out_features, like.in_features), like.bias
        count, device = like.in_features * like.out_features, like.weight.device
        blocks = -(-count // NF4_BLOCK)
        kinds: dict[str, tuple[int, torch.dtype]] = {"scales": (like.out_features, torch.float32)}
        if bits == 4:
            kinds = {
                "scales": (blocks, torch.uint8),
                "outer": (-(-blocks // SCALE_BLOCK), torch.float32),
                "mean": (1, torch.float32),
                "table": (256, torch.float32),
            }
        codes = torch.empty(-(-count // 2), dtype=torch.uint8, device=device)
        if bits == 8:
            codes = torch.empty(count, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        for name, (size, kind) in kinds.items():
            self.register_buffer(name, torch.empty(size, dtype=kind, device=device), persistent=False)

    def stored(self) -> tuple[Tensor, ...]:
        """The codes, and what they are scaled by."""
        return (self.weight.detach(), *(buffer for _, buffer in self.named_buffers(recurse=False)))

    @property
    def W_q(self) -> Tensor:  # noqa: N802
        """The codes, by the name at which peft asks a layer to ``dequantize`` itself."""
        return self.weight

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix that is computed with."""
        return dequantize(self.stored(), self.shape, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return _Product.apply(  # type: ignore[no-any-return,no-untyped-call]
            x, self.bias, self.shape, self.kernels_for(x), *self.stored()
        )


class _Product(torch.autograd.Function):
    """A product that keeps neither its input nor the matrix, which its backward makes again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, shape: tuple[int, ...], kernels: Kernels, *stored: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.shape, ctx.kernels, ctx.kind = shape, kernels, x.dtype
        return kernels.linear(x, dequantize(stored, shape, compute_dtype(x)), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        stored = ctx.saved_tensors  # once: a checkpointed block makes them again for one reader
        matrix = dequantize(stored, ctx.shape, gradient.dtype)
        given = ctx.kernels.linear(gradient, matrix.t(), None).to(ctx.kind)
        return (given, None, None, None, *(None for _ in stored))


def quantized_layers(root: nn.Module) -> dict[str, QuantizedLinear]:
    """Every map of a network that is kept in 4 or 8 bits, by the name of its module."""
    return {name: one for name, one in root.named_modules() if isinstance(one, QuantizedLinear)}


def quantize_blocks(root: nn.Module, bits: int) -> None:
    """Let every linear map but a head be kept in 4 or 8 bits; their values are arbitrary afterwards."""
    for name, module in list(root.named_modules()):
        if type(module) is Linear:
            parent, _, last = name.rpartition(".")
            setattr(root.get_submodule(parent), last, QuantizedLinear(module, bits))


def kept_values(name: str, values: Tensor, adapter: Adapter) -> Tensor:
    """The f32 values that a frozen weight has beside an adapter: what its bits leave of the file's.

    Args:
        name: of the weight in the file.
        values: the file's, f32.
        adapter: how the base is kept.
    """
    if adapter.is_coded(name, tuple(values.shape)):
        return dequantize(quantize(values, adapter.base_bits), tuple(values.shape), torch.float32)
    return values.bfloat16().float() if adapter.base_bits < 32 and is_halved(name, values.ndim) else values
