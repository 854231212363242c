"""Kernels for training on the CPU: own backward passes that keep fewer activations and fuse what is cheap.

A norm keeps its input, the gated product its two factors. The linear maps that read their results do not keep
these: they keep what a result is made of, and it is made again in the backward pass, once for all its readers
(`_Again`). So every map is a function of its own, called through its module, and no more is kept than one
function for all of them would keep. Products are in ``products``, attention is in ``cpu_attention``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from apr_dist.choices import KernelChoice
from apr_dist.model.families import Activation
from apr_dist.model.kernels import cpu_attention
from apr_dist.model.kernels.grouped import looped
from apr_dist.model.kernels.loss import LossStyle
from apr_dist.model.kernels.plain import Attend, Causal, Kernels, activated, compute_dtype
from apr_dist.model.kernels.products import cpu_matmul_backend, linear, mm
from apr_dist.model.kernels.tied_gradient import add_summed_rows

CACHE_BYTES: Final = 4 << 20
"""Logits in f32 that a processor's cache holds while several passes go over them."""


class CpuKernels(Kernels):
    """See the module."""

    name: ClassVar = KernelChoice.CPU
    _loss_style: ClassVar = LossStyle(mm=mm, pass_bytes=CACHE_BYTES, may_wait=True)
    _add_rows = staticmethod(add_summed_rows)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `Kernels.linear`."""
        x = x.to(compute_dtype(x))
        return _Linear.apply(x, weight, bias, _source_of(x))  # type: ignore[no-any-return,no-untyped-call]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Kernels.rms_norm`."""
        scale, again = _inverse_rms(x.detach(), eps), _Again(_normalized)
        normed: Tensor = _RMSNorm.apply(x, scale, weight, compute_dtype(x), again)  # type: ignore[no-untyped-call]
        return _made_of(normed, again, (x, scale, weight))

    def gated(self, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        """See `Kernels.gated`."""
        again = _Again(functools.partial(_gated, activation=activation))
        product: Tensor = _Gated.apply(gate, up, activation, again)  # type: ignore[no-untyped-call]
        return _made_of(product, again, (gate, up))

    def grouped(self, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """See `Kernels.grouped`."""
        return looped(rows.to(compute_dtype(rows)), weight, counts, mm)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See `Kernels.rotate`."""
        return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return,no-untyped-call]

    def causal(self, window: int | None = None, mask: Tensor | None = None) -> Attend:
        """See `Kernels.causal`."""
        return _CpuCausal(window, mask)

    def describe(self, *, z_loss: float) -> str:
        """See `Kernels.describe`."""
        return f"{super().describe(z_loss=z_loss)}, products {cpu_matmul_backend()}"


class _CpuCausal(Causal):
    """PyTorch's kernel, except where attention of large products is faster."""

    def _unmasked(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if cpu_attention.is_faster(query, key):
            return cpu_attention.causal_attention(query, key, value)
        return super()._unmasked(query, key, value)


class _Again:
    """Makes a result again for its readers' backward passes: once, until its maker's own turn comes.

    ``make`` gives the result, and what else the maker's backward pass can use.
    """

    def __init__(self, make: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
        self._make = make
        self._made: tuple[Tensor, Tensor | None] | None = None

    def result(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """The result out of its parts, in the type of ``like``."""
        if self._made is None:
            self._made = self._make(*parts, like.dtype)
        return self._made[0]

    def take(self) -> Tensor | None:
        """What else was made with the result, which is then forgotten."""
        made, self._made = self._made, None
        return None if made is None else made[1]


class _Source(NamedTuple):
    """What a result is made of, for a reader that would rather keep that."""

    again: _Again
    parts: tuple[Tensor, ...]
    version: int


_SOURCE: Final = "_apr_dist_source"


def _made_of(result: Tensor, again: _Again, parts: tuple[Tensor, ...]) -> Tensor:
    """The result, marked with its parts where there will be a backward pass."""
    if result.requires_grad:
        setattr(result, _SOURCE, _Source(again, parts, result._version))
    return result


def _source_of(x: Tensor) -> _Source | None:
    """What ``x`` is made of; None: not known, or ``x`` was changed since (a hook may do that)."""
    source: _Source | None = getattr(x, _SOURCE, None)
    return source if source is not None and source.version == x._version else None


def _normalized(x: Tensor, scale: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The norm's output, from its input and the inverse root mean square of each row."""
    normed: Tensor = (x.float() * scale).mul_(weight)
    return normed.to(dtype), None


def _gated(
    gate: Tensor, up: Tensor, dtype: torch.dtype, *, activation: Activation
) -> tuple[Tensor, Tensor | None]:
    """``activation(gate) * up``, and ``activation(gate)``."""
    factor = activated(gate, activation)
    return (factor * up).to(dtype), factor


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(mean(x^2) + eps)`` in f32, ``[..., 1]``."""
    norm: Tensor = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


# Each function below casts weights where it uses them and keeps the originals: a copy of every weight
# in the compute type, held from forward to backward, would be half the model again.


class _Linear(torch.autograd.Function):
    """A linear map that keeps its input, or what that is made of, where its weight is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, source: _Source | None) -> Tensor:
        ctx.again = None
        kept: tuple[Tensor, ...] = ()
        if ctx.needs_input_grad[1]:
            kept = (x,)
            if source is not None:
                ctx.again, kept = source.again, source.parts
        ctx.save_for_backward(weight, *kept)
        ctx.bias_dtype = None if bias is None else bias.dtype
        rows, bias = x.reshape(-1, x.shape[-1]), None if bias is None else bias.to(x.dtype)
        return linear(rows, weight.to(x.dtype), bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        rows = gradient.reshape(-1, weight.shape[0])
        dx = dw = db = None
        if ctx.needs_input_grad[1]:
            x = kept[0] if ctx.again is None else ctx.again.result(kept, gradient)
            dw = mm(rows.t(), x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            dx = mm(rows, weight.to(rows.dtype)).view(*gradient.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[2]:
            db = rows.sum(0, dtype=ctx.bias_dtype)
        return dx, dw, db, None


class _RMSNorm(torch.autograd.Function):
    """RMSNorm that keeps its input and one number per row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, weight: Tensor, dtype: torch.dtype, again: _Again
    ) -> Tensor:
        ctx.save_for_backward(x, scale, weight)
        ctx.again = again
        return _normalized(x, scale, weight, dtype)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.again.take()
        x, scale, weight = ctx.saved_tensors
        size = x.shape[-1]
        unit = (x.float() * scale).view(-1, size)
        wide = gradient.float().reshape(-1, size)
        product = wide * unit
        dw = product.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        along = torch.mv(product, weight.float()).div_(size).unsqueeze(1)
        dx = torch.mul(wide, weight, out=product).sub_(unit.mul_(along)).mul_(scale.view(-1, 1))
        return dx.view(x.shape).to(x.dtype), None, dw, None, None


class _Gated(torch.autograd.Function):
    """``activation(gate) * up`` that keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation, again: _Again) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.again = activation, again
        return activated(gate, activation).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        factor = ctx.again.take()
        d_up = (activated(gate, ctx.activation) if factor is None else factor).mul_(gradient)
        d_gate = gradient * up
        if ctx.activation is Activation.SILU:
            torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        else:
            d_gate = torch.ops.aten.gelu_backward(d_gate, gate, approximate="tanh")
        return d_gate, d_up, None, None


class _Rotate(torch.autograd.Function):
    """The rotation, whose gradient is the rotation back; keeps no activation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, direction=1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, sin, direction=-1.0), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, direction: float) -> Tensor:
    wide = x.float()
    half = x.shape[-1] // 2
    first, second = wide[..., :half], wide[..., half:]
    turned = torch.empty(x.shape, dtype=torch.float32)
    torch.mul(first, cos, out=turned[..., :half]).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=turned[..., half:]).addcmul_(first, sin, value=direction)
    return turned.to(x.dtype)
