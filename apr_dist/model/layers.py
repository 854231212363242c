"""The position-wise parts of a block: linear map, RMSNorm, gated MLP.

Each computes what its Hugging Face counterpart computes. Away from compiled code, the norm and the
MLP carry their own backward, which keeps fewer activations and recomputes what is cheap. Attention is
in ``attention``, RoPE in ``rotary``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from apr_dist.model.matmul import linear, mm


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
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

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

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size]`` to the same shape."""
        if not _own_backward(x):
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]
        weights = (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        return _GatedMLP.apply(x.to(compute_dtype(x)), *weights)  # type: ignore[no-any-return,no-untyped-call]


def compute_dtype(x: Tensor) -> torch.dtype:
    """Type in which a product with ``x`` is computed: autocast's where it is on, else that of ``x``."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


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
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed: Tensor = (wide * scale).mul_(weight)
        return normed.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        size = x.shape[-1]
        unit = (x.float() * scale).view(-1, size)
        wide = gradient.float().reshape(-1, size)
        product = wide * unit
        dw = product.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        along = torch.mv(product, weight.float()).div_(size).unsqueeze(1)
        dx = torch.mul(wide, weight, out=product).sub_(unit.mul_(along)).mul_(scale.view(-1, 1))
        return dx.view(x.shape).to(x.dtype), dw, None, None


class _GatedMLP(torch.autograd.Function):
    """The gated MLP, keeping its input, gate and up; the product of the two is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        gate, up = _project(rows, gate_weight), _project(rows, up_weight)
        ctx.save_for_backward(rows, gate, up, gate_weight, up_weight, down_weight)
        return _project(F.silu(gate).mul_(up), down_weight).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, gate_weight, up_weight, down_weight = ctx.saved_tensors
        needs_x, needs_gate, needs_up, needs_down = ctx.needs_input_grad
        shape = gradient.shape
        gradient = gradient.reshape(-1, shape[-1])
        inner = _project_back(gradient, down_weight)
        activated = F.silu(gate)
        d_up = inner * activated
        d_down = _weight_gradient(gradient, activated.mul_(up), down_weight) if needs_down else None
        d_gate = torch.ops.aten.silu_backward(inner.mul_(up), gate)
        dx = None
        if needs_x:
            dx = _project_back(d_gate, gate_weight).add_(_project_back(d_up, up_weight)).view(shape)
        d_gate_weight = _weight_gradient(d_gate, x, gate_weight) if needs_gate else None
        d_up_weight = _weight_gradient(d_up, x, up_weight) if needs_up else None
        return dx, d_gate_weight, d_up_weight, d_down
