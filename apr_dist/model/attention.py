"""Causal self-attention with grouped queries, one module for every family.

Keys and values are never repeated in memory: the kernel reads each KV head for its whole group of
query heads. Which kernel runs is decided by ``torch``'s scaled dot-product attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from apr_dist.model.config import TransformerConfig
from apr_dist.model.layers import Linear, RMSNorm
from apr_dist.model.rotary import Rotation, rotate


class Attention(nn.Module):
    """q, k, v, o projections around causal attention; biases and q/k norms as the family has them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.sliding_window = config.sliding_window
        hidden = config.hidden_size
        self.q_proj = Linear(hidden, config.query_size, bias=config.qkv_bias)
        self.k_proj = Linear(hidden, config.kv_size, bias=config.qkv_bias)
        self.v_proj = Linear(hidden, config.kv_size, bias=config.qkv_bias)
        self.o_proj = Linear(config.query_size, hidden, bias=False)
        self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        """``[batch, seq, hidden]`` to the same shape; position ``i`` sees positions up to ``i``."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        query, key, value = (p(x).view(heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, rotation), rotate(key, rotation)
        mixed = causal_attention(query, key, value, window=self.sliding_window)
        return self.o_proj(mixed.flatten(2))  # type: ignore[no-any-return]


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, window: int | None = None) -> Tensor:
    """Causal attention of ``[batch, seq, heads, head_dim]`` over keys and values with fewer heads.

    Args:
        query: ``[batch, seq, heads, head_dim]``.
        key: ``[batch, seq, kv_heads, head_dim]``; head ``h`` of the query reads KV head
            ``h // (heads / kv_heads)``.
        value: like ``key``.
        window: position ``i`` sees only the last ``window`` positions up to its own.

    Returns:
        ``[batch, seq, heads, head_dim]``.
    """
    length = query.shape[1]
    masked = window is not None and window < length
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=_band(length, window or length, query.device) if masked else None,
        is_causal=not masked,
        enable_gqa=key.shape[2] != query.shape[2],
    )
    return mixed.transpose(1, 2)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """``[length, length]``, true where a query may look: the last ``window`` positions."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril_().triu_(1 - window)
