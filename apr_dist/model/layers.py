"""The position-wise parts of a block: linear map, RMSNorm, gated MLP.

Each computes what its Hugging Face counterpart computes. On the CPU, away from compiled code, they carry
their own backward, which keeps fewer activations and recomputes what is cheap: of a norm and the linear
maps that read it, only the norm's input is kept. Attention is in ``attention``, RoPE in ``rotary``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from apr_dist.model.matmul import linear, mm
from apr_dist.model.tied_gradient import TiedGradient, look_up


class Linear(nn.Linear):
    """``y = x W^T + b`` with weight ``[out_features, in_features]``, as `torch.nn.Linear`."""

    def reset_parameters(self) -> None:
        """Draw values, except on the meta device, where that loads PyTorch's compiler for nothing (4 s)."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if _own_backward(x):
            return _Linear.apply(x.to(compute_dtype(x)), self.weight, self.bias)  # type: ignore[no-any-return,no-untyped-call]
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """A row of ``weight`` ``[vocab, hidden]`` for each id, as `torch.nn.Embedding`."""

    def reset_parameters(self) -> None:
        """Draw values, except on the meta device; see `Linear.reset_parameters`."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, ids: Tensor, *, tied: TiedGradient | None = None) -> Tensor:
        """Integers ``[...]`` to ``[..., hidden]``; with ``tied`` their gradient joins the head's."""
        return look_up(self.weight, ids, tied)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in f32 inside (arXiv:1910.07467)."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``[..., size]`` to the same shape, in the type products are computed in."""
        if _own_backward(x):
            return _RMSNorm.apply(x, self.weight, self.eps, compute_dtype(x))  # type: ignore[no-any-return,no-untyped-call]
        # Autocast on CUDA makes this f32; cast here, it is read as it is by all maps behind the norm.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(compute_dtype(x))

    def extra_repr(self) -> str:
        """Size and eps, for printing the network."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``, without biases (SwiGLU, arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """The MLP of ``norm(x)``: ``[..., hidden_size]`` to the same shape."""
        if not _own_backward(x):
            x = norm(x)
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]
        weights = (norm.weight, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        return _NormedMLP.apply(x, norm.eps, compute_dtype(x), *weights)  # type: ignore[no-any-return,no-untyped-call]


def project_normed(x: Tensor, norm: RMSNorm, maps: Sequence[Linear]) -> tuple[Tensor, ...]:
    """``norm(x)`` through each of the linear maps: ``[..., size]`` to their ``[..., out_features]``."""
    if not _own_backward(x):
        normed = norm(x)
        return tuple(linear_map(normed) for linear_map in maps)
    weights = [linear_map.weight for linear_map in maps]
    biases = [linear_map.bias for linear_map in maps]
    return _NormedLinear.apply(x, norm.eps, compute_dtype(x), norm.weight, *weights, *biases)  # type: ignore[no-any-return,no-untyped-call]


def compute_dtype(x: Tensor) -> torch.dtype:
    """Type in which a product with ``x`` is computed: autocast's where it is on, else that of ``x``."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def _own_backward(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _project(rows: Tensor, weight: Tensor) -> Tensor:
    """``[n, in]`` and ``[out, in]`` to ``[n, out]``; the weight is cast to the type of the rows."""
    return linear(rows, weight.to(rows.dtype))


def _project_back(gradient: Tensor, weight: Tensor) -> Tensor:
    """``[n, out]`` and ``[out, in]`` to ``[n, in]``: the gradient of the rows."""
    return mm(gradient, weight.to(gradient.dtype))


def _weight_gradient(gradient: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """``[n, out]`` and ``[n, in]`` to ``[out, in]``, in the type of the weight."""
    return mm(gradient.t(), rows).to(weight.dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(mean(x^2) + eps)`` in f32, ``[..., 1]``."""
    norm: Tensor = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _normalized(x: Tensor, scale: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The norm's output, from its input and the inverse root mean square of each row."""
    normed: Tensor = (x.float() * scale).mul_(weight)
    return normed.to(dtype)


def _norm_gradients(
    gradient: Tensor, x: Tensor, scale: Tensor, weight: Tensor, *, wants_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the norm's input and of its weight, from that of its output."""
    size = x.shape[-1]
    unit = (x.float() * scale).view(-1, size)
    wide = gradient.float().reshape(-1, size)
    product = wide * unit
    dw = product.sum(0).to(weight.dtype) if wants_weight else None
    along = torch.mv(product, weight.float()).div_(size).unsqueeze(1)
    dx = torch.mul(wide, weight, out=product).sub_(unit.mul_(along)).mul_(scale.view(-1, 1))
    return dx.view(x.shape).to(x.dtype), dw


# Each function below casts weights where it uses them and keeps the originals: a copy of every weight
# in the compute type, held from forward to backward, would be half the model again.


class _Linear(torch.autograd.Function):
    """A linear map whose three products go through `mm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        product = linear(
            x.reshape(-1, x.shape[-1]), weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        )
        return product.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, weight.shape[0])
        dx = _project_back(rows, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        dw = _weight_gradient(rows, x.reshape(-1, x.shape[-1]), weight) if ctx.needs_input_grad[1] else None
        db = rows.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, dw, db


class _RMSNorm(torch.autograd.Function):
    """RMSNorm that keeps its input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        scale = _inverse_rms(x, eps)
        ctx.save_for_backward(x, scale, weight)
        return _normalized(x, scale, weight, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = _norm_gradients(gradient, *ctx.saved_tensors, wants_weight=ctx.needs_input_grad[1])
        return dx, dw, None, None


class _NormedLinear(torch.autograd.Function):
    """Linear maps of one norm, keeping the norm's input; its output is computed again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, eps: float, dtype: torch.dtype, norm_weight: Tensor, *maps: Tensor | None
    ) -> tuple[Tensor, ...]:
        scale = _inverse_rms(x, eps)
        rows = _normalized(x, scale, norm_weight, dtype).view(-1, x.shape[-1])
        weights, biases = maps[: len(maps) // 2], maps[len(maps) // 2 :]
        ctx.save_for_backward(x, scale, norm_weight, *weights)
        ctx.dtype, ctx.bias_dtypes = dtype, [None if bias is None else bias.dtype for bias in biases]
        products = (
            linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))  # type: ignore[union-attr]
            for weight, bias in zip(weights, biases, strict=True)
        )
        return tuple(product.view(*x.shape[:-1], -1) for product in products)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, norm_weight, *weights = ctx.saved_tensors
        needs_x, _, _, needs_norm, *needs_maps = ctx.needs_input_grad
        needs_weights, needs_biases = needs_maps[: len(weights)], needs_maps[len(weights) :]
        rows = _normalized(x, scale, norm_weight, ctx.dtype).view(-1, x.shape[-1])
        flat = [gradient.reshape(rows.shape[0], -1) for gradient in gradients]
        dw = [
            _weight_gradient(gradient, rows, weight) if needs else None
            for gradient, weight, needs in zip(flat, weights, needs_weights, strict=True)
        ]
        db = [
            gradient.sum(0, dtype=dtype) if needs else None
            for gradient, dtype, needs in zip(flat, ctx.bias_dtypes, needs_biases, strict=True)
        ]
        del rows
        dx = dn = None
        if needs_x or needs_norm:
            d_rows = _sum_back(flat, weights)
            dx, dn = _norm_gradients(d_rows, x, scale, norm_weight, wants_weight=needs_norm)
        return dx, None, None, dn, *dw, *db


class _NormedMLP(torch.autograd.Function):
    """The gated MLP of a norm, keeping the norm's input, gate and up; the rest is computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        eps: float,
        dtype: torch.dtype,
        norm_weight: Tensor,
        gate_weight: Tensor,
        up_weight: Tensor,
        down_weight: Tensor,
    ) -> Tensor:
        scale = _inverse_rms(x, eps)
        rows = _normalized(x, scale, norm_weight, dtype).view(-1, x.shape[-1])
        gate, up = _project(rows, gate_weight), _project(rows, up_weight)
        ctx.save_for_backward(x, scale, norm_weight, gate, up, gate_weight, up_weight, down_weight)
        del rows
        return _project(F.silu(gate).mul_(up), down_weight).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, norm_weight, gate, up, gate_weight, up_weight, down_weight = ctx.saved_tensors
        needs_x, _, _, needs_norm, needs_gate, needs_up, needs_down = ctx.needs_input_grad
        gradient = gradient.reshape(-1, gradient.shape[-1])
        inner = _project_back(gradient, down_weight)
        activated = F.silu(gate)
        d_up = inner * activated
        d_down = _weight_gradient(gradient, activated.mul_(up), down_weight) if needs_down else None
        del activated
        d_gate = torch.ops.aten.silu_backward(inner.mul_(up), gate)
        del inner
        rows = _normalized(x, scale, norm_weight, gate.dtype).view(-1, x.shape[-1])
        d_gate_weight = _weight_gradient(d_gate, rows, gate_weight) if needs_gate else None
        d_up_weight = _weight_gradient(d_up, rows, up_weight) if needs_up else None
        del rows
        dx = dn = None
        if needs_x or needs_norm:
            d_rows = _sum_back((d_gate, d_up), (gate_weight, up_weight))
            dx, dn = _norm_gradients(d_rows, x, scale, norm_weight, wants_weight=needs_norm)
        return dx, None, None, dn, d_gate_weight, d_up_weight, d_down


def _sum_back(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The gradient of rows that several linear maps read."""
    total = _project_back(gradients[0], weights[0])
    for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
        total.add_(_project_back(gradient, weight))
    return total
