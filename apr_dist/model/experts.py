"""A mixture of experts in place of a block's MLP: router, experts, and what the router's losses are made of.

Every token is computed by all the experts that its router chose: none has a capacity, so none is dropped.
What becomes of the sums is in ``routing``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from apr_dist.model.config import TransformerConfig
from apr_dist.model.kernels.grouped import taken
from apr_dist.model.layers import Computed
from apr_dist.model.routing import routed_sums

_STD = 0.02


class Router(nn.Module):
    """Logits of the experts, in f32 whatever else is computed in."""

    def __init__(self, experts: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(_drawn(experts, hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """``[n, hidden]`` to f32 ``[n, experts]``."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


class Experts(Computed):
    """Gated MLPs without biases, their matrices side by side.

    ``gate_up_proj`` is ``[experts, 2 * inner, hidden]``, rows of the gate first; ``down_proj`` is
    ``[experts, hidden, inner]``.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        experts, inner, hidden = config.num_experts or 1, config.expert_size, config.hidden_size
        self.activation = config.activation
        self.gate_up_proj = nn.Parameter(_drawn(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(_drawn(experts, hidden, inner))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of what the chosen experts make of each token.

        Args:
            x: tokens ``[n, hidden]``.
            chosen: int64 ``[n, k]``, the experts of each.
            weights: f32 ``[n, k]``, of what each of these gives.
        """
        kernels, (tokens, each) = self.kernels_for(x), chosen.shape
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        counts = flat.new_zeros(self.down_proj.shape[0]).scatter_add_(0, flat, torch.ones_like(flat))
        rows = taken(x, order // each, places.view(tokens, each))
        gate, up = kernels.grouped(rows, self.gate_up_proj, counts).chunk(2, dim=-1)
        inner = kernels.gated(gate, up, self.activation)
        made = taken(kernels.grouped(inner, self.down_proj, counts), places, order[:, None])
        return (made.view(tokens, each, -1) * weights[..., None]).sum(1)


class MixtureMLP(nn.Module):
    """A router and its experts; `routing.routed_sums` says what else a call returns."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.each, self.normed = config.active_experts, config.normed_routes
        self.gate = Router(config.num_experts or 1, config.hidden_size)
        self.experts = Experts(config)

    def forward(self, x: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``[batch, seq, hidden]`` to the same shape and the sums of the router.

        Args:
            x: hidden states.
            counted: bool ``[batch, seq]``, tokens that are in the sums; None: all.
        """
        rows = x.reshape(-1, x.shape[-1])
        logits = self.gate(rows)
        shares = logits.softmax(dim=-1)
        weights, chosen = shares.topk(self.each, dim=-1)
        if self.normed:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        made: Tensor = self.experts(rows, chosen, weights)
        sums = routed_sums(logits, shares, chosen, None if counted is None else counted.flatten())
        return made.view(x.shape), sums


def _drawn(*shape: int) -> Tensor:
    """Values to begin with, except on the meta device; `transformer.init_weights` gives others."""
    values = torch.empty(shape)
    return values if values.is_meta else values.normal_(0.0, _STD)
