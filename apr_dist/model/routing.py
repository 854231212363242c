"""What the routers of a mixture did: sums over tokens, the losses that are made of them, and figures.

The load-balancing loss is that of Switch Transformer (arXiv:2101.03961, equations 4 to 6) as ``transformers``
computes it: over the tokens of all layers together. The z-loss is that of ST-MoE (arXiv:2202.08906, equation
5), the mean over tokens and layers. Tokens that no loss counts (padding) are in neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]
"""Sums an f64 tensor over all ranks."""


def routed_sums(logits: Tensor, shares: Tensor, chosen: Tensor, counted: Tensor | None) -> Tensor:
    """Sums over tokens, f32 ``[2 * experts + 3]``: what `Routing` is made of.

    Tokens of each expert; shares of each, and the squares of the log-partition, both with their gradient;
    the entropy in nats; tokens.

    Args:
        logits: of the router, f32 ``[n, experts]``.
        shares: their softmax.
        chosen: int64 ``[n, k]``, the experts of each token.
        counted: bool ``[n]``, tokens that are in the sums; None: all.
    """
    taking = torch.ones_like(shares[:, :1]) if counted is None else counted.to(shares.dtype)[:, None]
    times = taking.expand(chosen.shape).reshape(-1)
    tokens = shares.new_zeros(shares.shape[1]).scatter_add_(0, chosen.flatten(), times)
    squares = (logits.logsumexp(dim=-1, keepdim=True).square() * taking).sum()
    entropy = (torch.special.entr(shares.detach()) * taking).sum()
    ends = torch.stack((squares, entropy, taking.sum()))
    return torch.cat((tokens, (shares * taking).sum(dim=0), ends))


@dataclass
class Routing:
    """The router's losses of one decoder, and sums since they were last taken.

    Attributes:
        layers: of the decoder.
        experts: of each layer.
        each: experts that compute a token.
        balance: weight of the load-balancing loss.
        z_loss: weight of the router's z-loss.
        total: sums over the ranks of a run; None: there is one.
    """

    layers: int
    experts: int
    each: int
    balance: float = 0.0
    z_loss: float = 0.0
    total: Total | None = None

    def __post_init__(self) -> None:
        self._trained: Tensor | None = None
        self._measured: Tensor | None = None

    @property
    def size(self) -> int:
        """Elements of the sums of all layers."""
        return self.layers * (2 * self.experts + 3)

    def joined(self, loss: Tensor, sums: Tensor, targets: Tensor) -> Tensor:
        """The summed loss, whose gradient is then that of the router's losses too; its value stays.

        Both are means over the tokens of this forward on all ranks, and count as often as its targets do: a
        step's gradient is that of the mean over its forwards of loss plus weighted router's losses.

        Args:
            loss: over the targets of this rank, without the router's losses.
            sums: f32 ``[layers, 2 * experts + 3]``, of this rank.
            targets: how many targets the loss counts.
        """
        self._note(sums)
        if not torch.is_grad_enabled() or not (self.balance or self.z_loss):
            return loss
        mine = sums.double().sum(0)
        shared = torch.cat((mine.detach(), targets.double().view(1)))
        if self.total is not None:
            shared = self.total(shared)
        number, tokens = self.experts, shared[-2].clamp(min=1.0)
        often = shared[:number] / tokens
        balance = number * (often * mine[number : 2 * number]).sum() / tokens
        extra = shared[-1] * (self.balance * balance + self.z_loss * mine[2 * number] / tokens)
        extra = extra.to(loss.dtype)
        return loss + (extra - extra.detach())

    def _note(self, sums: Tensor) -> None:
        held = sums.detach().double().flatten()
        if torch.is_grad_enabled():
            self._trained = held if self._trained is None else self._trained + held
        else:
            self._measured = held if self._measured is None else self._measured + held

    def take_trained(self, device: torch.device) -> Tensor:
        """Sums of the forwards with a gradient since the last time, f64 ``[size]``, of this rank."""
        held, self._trained = self._trained, None
        return torch.zeros(self.size, dtype=torch.float64, device=device) if held is None else held

    def take_measured(self, device: torch.device) -> Tensor:
        """The same of those without."""
        held, self._measured = self._measured, None
        return torch.zeros(self.size, dtype=torch.float64, device=device) if held is None else held

    def figures(self, sums: Tensor) -> RoutingFigures | None:
        """Figures of sums over all ranks, f64 ``[size]``; None without a token."""
        table = sums.view(self.layers, -1)
        if not float(table[:, -1].sum()):
            return None
        number, all_layers = self.experts, table.sum(0)
        tokens, often = table[:, :number], all_layers[:number] / all_layers[-1]
        chosen = table[:, -1].sum() * self.each
        share = tokens / (table[:, -1:] * self.each)
        return RoutingFigures(
            balance_loss=float(number * (often * all_layers[number : 2 * number]).sum() / all_layers[-1]),
            z_loss=float(all_layers[2 * number] / all_layers[-1]),
            entropy=float(all_layers[2 * number + 1] / all_layers[-1]),
            load=tuple(tuple(row) for row in (share * number).tolist()),
            dropped=float(1 - tokens.sum() / chosen),
        )


@dataclass(frozen=True, kw_only=True)
class RoutingFigures:
    """What routers did with the tokens of a batch or a sample.

    Attributes:
        balance_loss: load-balancing loss, without its weight; 1 times the experts of a token where all
            experts have as many tokens.
        z_loss: mean square of the log-partition of a router's logits, without its weight.
        entropy: of a router's shares, mean over tokens and layers, in nats.
        load: of each layer the tokens of each expert, as a multiple of an equal share.
        dropped: share of the choices that no expert computed.
    """

    balance_loss: float
    z_loss: float
    entropy: float
    load: tuple[tuple[float, ...], ...]
    dropped: float

    @property
    def idle(self) -> tuple[str, ...]:
        """Name of each expert that got no token."""
        return tuple(
            f"model.layers.{layer}.mlp.experts {expert}"
            for layer, row in enumerate(self.load)
            for expert, load in enumerate(row)
            if load == 0
        )

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON values; of the loads the least and the most, and how many are none."""
        loads = [load for row in self.load for load in row]
        return {
            "balance_loss": self.balance_loss,
            "z_loss": self.z_loss,
            "entropy": self.entropy,
            "load_min": min(loads),
            "load_max": max(loads),
            "dropped": self.dropped,
            "idle": len(self.idle),
        }
