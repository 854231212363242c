"""The interface of a set of kernels, and the plain one: PyTorch's own operators, differentiated by autograd.

It computes on every device and is what the compiler is given. Own backward passes for the CPU are in ``cpu``,
what only CUDA has in ``cuda``. The loss and the gradient of a tied weight are in ``loss`` and
``tied_gradient``; sets differ in how they like these computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from apr_dist.choices import KernelChoice
from apr_dist.model.families import Activation
from apr_dist.model.kernels.loss import (
    Loss,
    LossStyle,
    LossTerms,
    chunked_cross_entropy,
    count_targets,
    soft_capped,
)
from apr_dist.model.kernels.tied_gradient import TiedGradient, add_rows, look_up
from apr_dist.model.packing import Boundaries

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of queries ``[batch, new, heads, head_dim]`` over keys and values with fewer heads.

Keys and values are ``[batch, seq, kv_heads, head_dim]``; query head ``h`` reads KV head
``h // (heads / kv_heads)``. The queries are the last positions of the sequence; each sees itself and what is
before it, as far as its document and window reach. Returns the queries' shape.
"""


class Kernels:
    """What a decoder is computed with. A set overrides what it computes in another way."""

    name: ClassVar = KernelChoice.PLAIN
    _loss_style: ClassVar = LossStyle()
    _add_rows = staticmethod(add_rows)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + b``: ``[..., in]`` and ``[out, in]`` to ``[..., out]``, in `compute_dtype`."""
        if weight.dtype is not x.dtype and not weight.requires_grad:
            weight = weight.to(compute_dtype(x))  # a frozen matrix that is kept in another type
        return F.linear(x, weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, f32 inside, in `compute_dtype`."""
        # Autocast on CUDA makes this f32; cast here, it is read as it is by all maps behind the norm.
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps).to(compute_dtype(x))

    def gated(self, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        """``activation(gate) * up`` of two tensors of one shape."""
        return activated(gate, activation) * up

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn each pair ``(i, i + head_dim / 2)`` of ``[..., head_dim]`` by its angle, in f32."""
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    def look_up(self, weight: Tensor, ids: Tensor, tied: TiedGradient | None) -> Tensor:
        """Rows of ``weight`` for integers ``[...]``; with ``tied`` their gradient joins the head's."""
        return look_up(weight, ids, tied, self._add_rows)

    def attention(
        self,
        shape: tuple[int, int],
        device: torch.device,
        *,
        dtype: torch.dtype,
        window: int | None = None,
        softcap: float | None = None,
        documents: Boundaries | None = None,
        whole: bool = True,
    ) -> Attend:
        """Attention over one batch, prepared once for all blocks that see as much.

        Capped scores are computed by `Capped` on every device: no set has a kernel of its own for them.

        Args:
            shape: ``(batch, seq)`` of the tokens.
            device: where they are.
            dtype: type of queries, keys and values.
            window: positions that one sees, its own among them; None: all before it.
            softcap: scores ``s`` become ``softcap * tanh(s / softcap)``; None: they stay.
            documents: where documents begin that see only themselves.
            whole: whether the tokens are whole sequences; else more positions are before them, in a cache.
        """
        del dtype
        causal = self.causal if softcap is None else functools.partial(Capped, softcap=softcap)
        if documents is not None:
            return Spans(causal(window), documents.spans())
        if whole and window is not None and window < shape[1]:
            return causal(window, band(shape[1], shape[1], window, device))
        return causal(window)

    def causal(self, window: int | None = None, mask: Tensor | None = None) -> Attend:
        """Causal attention of whole rows; ``mask`` is that of the window, where it was made before."""
        return Causal(window, mask)

    def cross_entropy(
        self,
        hidden: Tensor,
        head_weight: Tensor,
        targets: Tensor,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        chunk_tokens: int | None = None,
    ) -> Loss:
        """Summed cross-entropy of ``softmax(hidden @ head_weight.T)``, of which only a chunk is ever held.

        Args:
            hidden: ``[..., hidden]``.
            head_weight: ``[vocab, hidden]``.
            targets: integers ``[...]``; -100 does not count.
            z_loss: weight of ``logsumexp(logits)^2``, added per token (PaLM, arXiv:2204.02311, section 5).
            softcap: logits ``l`` become ``softcap * tanh(l / softcap)`` first; None: they stay.
            chunk_tokens: tokens per chunk; by default equal chunks of at most 128 MB (`flops.logits_chunk`).
        """
        targets, dtype = targets.reshape(-1).long(), compute_dtype(hidden)
        rows = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            terms = LossTerms(z_loss=z_loss, softcap=softcap)
            total, penalty = self._summed_loss(rows, head_weight, targets, terms, chunk_tokens)
        return Loss(total, penalty, count_targets(targets))

    def _summed_loss(
        self, rows: Tensor, weight: Tensor, targets: Tensor, terms: LossTerms, chunk_tokens: int | None
    ) -> tuple[Tensor, Tensor]:
        style = self._loss_style
        return chunked_cross_entropy(rows, weight, targets, terms, chunk_tokens=chunk_tokens, style=style)

    def has_own_loss(self, *, z_loss: float, softcap: float | None = None) -> bool:
        """Whether the loss is the chunked one, which lets go of the head's gradient (`tied_gradient`)."""
        del z_loss, softcap
        return True

    def isolation(self, device: torch.device, dtype: torch.dtype) -> str:
        """What keeps packed documents apart, for a line of the log."""
        del device, dtype
        return "spans"

    def describe(self, *, z_loss: float) -> str:
        """The choices made inside the set, for a line of the log."""
        loss = "chunked" if self.has_own_loss(z_loss=z_loss) else "liger"
        return f"{self.name} kernels, loss {loss}"


@dataclass(frozen=True)
class Causal:
    """Causal attention by PyTorch, which chooses the kernel and never repeats KV heads in memory."""

    window: int | None = None
    mask: Tensor | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `Attend`."""
        new, length, window = query.shape[1], key.shape[1], self.window
        if new == 1 and window is not None:
            key, value = key[:, -window:], value[:, -window:]
        windowed = new > 1 and window is not None and window < length
        if not windowed and not 1 < new < length:
            return self._unmasked(query, key, value)
        mask = band(new, length, window or length, query.device) if self.mask is None else self.mask
        return self._masked(query, key, value, mask)

    def _masked(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Queries that see the keys where ``mask`` ``[new, seq]`` is true."""
        return _scaled_dot_product(query, key, value, mask)

    def _unmasked(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One query over all keys, or queries that see every position before them."""
        return _scaled_dot_product(query, key, value, None)


@dataclass(frozen=True, kw_only=True)
class Capped(Causal):
    """Causal attention whose scores ``s`` become ``softcap * tanh(s / softcap)``, in f32; it holds all."""

    window: int | None = field(default=None, kw_only=False)
    mask: Tensor | None = field(default=None, kw_only=False)
    softcap: float

    def _masked(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        grouped = query.view(*query.shape[:2], key.shape[2], -1, query.shape[3])
        scores = torch.einsum("bqhgd,bkhd->bhgqk", grouped, key).float() * query.shape[3] ** -0.5
        capped = soft_capped(scores, self.softcap).masked_fill(~mask, -torch.inf)
        shares = capped.softmax(dim=-1).to(value.dtype)
        return torch.einsum("bhgqk,bkhd->bqhgd", shares, value).flatten(2, 3)

    def _unmasked(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        new, length = query.shape[1], key.shape[1]
        return self._masked(query, key, value, band(new, length, length, query.device))


@dataclass(frozen=True)
class Spans:
    """Packed documents, each attended on its own; spans are ``(row, start, stop)``."""

    causal: Attend
    spans: tuple[tuple[int, int, int], ...]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `Attend`."""
        rows: list[list[Tensor]] = [[] for _ in range(query.shape[0])]
        for row, start, stop in self.spans:
            parts = (tensor[row : row + 1, start:stop] for tensor in (query, key, value))
            rows[row].append(self.causal(*parts))
        return torch.cat([torch.cat(parts, dim=1) for parts in rows], dim=0)


def band(new: int, length: int, window: int, device: torch.device) -> Tensor:
    """``[new, length]``, true where a query may look: the last ``window`` positions up to its own."""
    full = torch.ones(length, length, dtype=torch.bool, device=device).tril_().triu_(1 - window)
    return full[length - new :]


def activated(gate: Tensor, activation: Activation) -> Tensor:
    """The activation of a gate."""
    return F.silu(gate) if activation is Activation.SILU else F.gelu(gate, approximate="tanh")


def compute_dtype(x: Tensor) -> torch.dtype:
    """Type in which a product with ``x`` is computed: autocast's where it is on, else that of ``x``."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def _scaled_dot_product(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None and query.shape[1] > 1,
        enable_gqa=key.shape[2] != query.shape[2],
    )
    return mixed.transpose(1, 2)
