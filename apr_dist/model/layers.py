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


class TrainedRows(nn.Module):
    """Rows of a frozen matrix ``[vocab, hidden]`` that are trained in place of its own.

    Args:
        tokens: ids of the rows.
        size: of a row.
        device: where they are made.
    """

    ids: Tensor

    def __init__(self, tokens: tuple[int, ...], size: int, device: torch.device) -> None:
        super().__init__()
        self._tokens = tokens
        self.trainable_tokens_delta = nn.Parameter(torch.empty(len(tokens), size, device=device))
        self.register_buffer("ids", torch.tensor(tokens, device=device), persistent=False)

    def reset(self) -> None:
        """Write the ids again, in place; needed after ``to_empty``."""
        self.ids.copy_(torch.tensor(self._tokens))

    def placed(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Looked-up rows ``[..., hidden]`` of ``ids`` ``[...]``, the trained ones where they belong."""
        found = ids[..., None] == self.ids
        own = self.trainable_tokens_delta.to(rows.dtype)[found.int().argmax(-1)]
        return torch.where(found.any(-1, keepdim=True), own, rows)

    def merged(self, matrix: Tensor) -> Tensor:
        """The whole matrix, for a head."""
        return matrix.index_copy(0, self.ids, self.trainable_tokens_delta.to(matrix.dtype))


def _trained(owner: nn.Module) -> TrainedRows | None:
    """The trained rows beside a matrix, which an adapter put there as ``token_adapter``."""
    return getattr(owner, "token_adapter", None)


def _with_trained(owner: Linear | Embedding) -> Tensor:
    """The matrix with its trained rows, if it has any."""
    trained = _trained(owner)
    return owner.weight if trained is None else trained.merged(owner.weight)


class Head(Linear):
    """The linear map to the vocabulary, which with targets computes the loss instead of its logits."""

    def forward(  # type: ignore[override]
        self, x: Tensor, targets: Tensor | None = None, *, z_loss: float = 0.0, softcap: float | None = None
    ) -> Tensor | Loss:
        """``[..., hidden]`` to logits ``[..., vocab]``, or with targets ``[...]`` to the summed loss.

        With ``softcap`` the loss is that of capped logits (`Kernels.cross_entropy`).
        """
        if targets is None:
            return self.kernels_for(x).linear(x, self.rows, self.bias)
        return self.kernels_for(x).cross_entropy(x, self.rows, targets, z_loss=z_loss, softcap=softcap)

    @property
    def rows(self) -> Tensor:
        """The matrix that is computed with."""
        return _with_trained(self)


class Embedding(Computed, nn.Embedding):
    """A row of ``weight`` ``[vocab, hidden]`` for each id, as `torch.nn.Embedding`."""

    def reset_parameters(self) -> None:
        """Draw values, except on the meta device; see `Linear.reset_parameters`."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, ids: Tensor, *, tied: TiedGradient | None = None) -> Tensor:
        """Integers ``[...]`` to f32 ``[..., hidden]``; with ``tied`` their gradient joins the head's."""
        rows = self.kernels_for(ids).look_up(self.weight, ids, tied)
        if (trained := _trained(self)) is not None:
            rows = trained.placed(ids, rows)
        return rows.float() if rows.dtype is torch.bfloat16 else rows

    @property
    def rows(self) -> Tensor:
        """The matrix that rows are taken from, for a tied head."""
        return _with_trained(self)


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
