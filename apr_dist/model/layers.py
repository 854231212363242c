"""The position-wise parts of a block: linear map, embedding, RMSNorm, gated MLP, and the head with its loss.

Each computes what its Hugging Face counterpart computes, by a set of kernels. Attention is in ``attention``,
RoPE in ``rotary``; how a device computes any of it is in ``kernels``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apr_dist.model.families import Activation
from apr_dist.model.kernels.choice import kernels_on
from apr_dist.model.kernels.loss import Loss
from apr_dist.model.kernels.plain import Kernels
from apr_dist.model.kernels.tied_gradient import TiedGradient


class Computed(nn.Module):
    """A module whose arithmetic is that of a set of kernels.

    ``kernels`` is the set that was chosen for it; None takes that of the device.
    """

    kernels: Kernels | None = None

    def kernels_for(self, x: Tensor, *, compiled: bool = False) -> Kernels:
        """The set that computes with ``x``, here or in compiled code."""
        return self.kernels or kernels_on(x.device, compiled=compiled)


class Linear(Computed, nn.Linear):
    """``y = x W^T + b`` with weight ``[out_features, in_features]``, as `torch.nn.Linear`."""

    def reset_parameters(self) -> None:
        """Draw values, except on the meta device, where that loads PyTorch's compiler for nothing (4 s)."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return self.kernels_for(x).linear(x, self.weight, self.bias)


class Head(Linear):
    """The linear map to the vocabulary, which with targets computes the loss instead of its logits."""

    def forward(  # type: ignore[override]
        self, x: Tensor, targets: Tensor | None = None, *, z_loss: float = 0.0, softcap: float | None = None
    ) -> Tensor | Loss:
        """``[..., hidden]`` to logits ``[..., vocab]``, or with targets ``[...]`` to the summed loss.

        With ``softcap`` the loss is that of capped logits (`Kernels.cross_entropy`).
        """
        if targets is None:
            return super().forward(x)
        return self.kernels_for(x).cross_entropy(x, self.weight, targets, z_loss=z_loss, softcap=softcap)


class Embedding(Computed, nn.Embedding):
    """A row of ``weight`` ``[vocab, hidden]`` for each id, as `torch.nn.Embedding`."""

    def reset_parameters(self) -> None:
        """Draw values, except on the meta device; see `Linear.reset_parameters`."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, ids: Tensor, *, tied: TiedGradient | None = None) -> Tensor:
        """Integers ``[...]`` to f32 ``[..., hidden]``; with ``tied`` their gradient joins the head's."""
        rows = self.kernels_for(ids).look_up(self.weight, ids, tied)
        return rows.float() if rows.dtype is torch.bfloat16 else rows


class RMSNorm(Computed):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in f32 inside (arXiv:1910.07467).

    With ``one_plus`` it multiplies by ``1 + weight``, added in f32, as Gemma does.
    """

    def __init__(self, size: int, *, eps: float, one_plus: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if one_plus else torch.ones(size))
        self.eps = eps
        self.one_plus = one_plus

    def forward(self, x: Tensor) -> Tensor:
        """``[..., size]`` to the same shape, in the type products are computed in."""
        weight = 1.0 + self.weight.float() if self.one_plus else self.weight
        return self.kernels_for(x).rms_norm(x, weight, self.eps)

    def extra_repr(self) -> str:
        """Size and eps, for printing the network."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class GatedMLP(Computed):
    """``down(activation(gate(x)) * up(x))``, without biases (SwiGLU and GeGLU, arXiv:2002.05202)."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: Activation = Activation.SILU
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size]`` to the same shape."""
        gated = self.kernels_for(x).gated(self.gate_proj(x), self.up_proj(x), self.activation)
        return self.down_proj(gated)  # type: ignore[no-any-return]
