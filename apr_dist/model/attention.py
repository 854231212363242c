"""Causal self-attention with grouped queries, one module for every family.

Keys and values are never repeated in memory: the kernel reads each KV head for its whole group of
query heads. Which kernel runs is decided by ``torch``'s scaled dot-product attention, except where
``cpu_attention`` is faster; packed documents are in ``packing``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from apr_dist.model import cpu_attention
from apr_dist.model.config import TransformerConfig
from apr_dist.model.layers import Linear, RMSNorm, project_normed
from apr_dist.model.packing import Documents, attend_documents, band
from apr_dist.model.rotary import Rotation, rotate


@dataclass
class LayerCache:
    """Keys and values of the positions one block has seen, for generating token by token.

    ``capacity`` is the number of positions there is room for; ``length`` how many are filled.
    """

    capacity: int
    length: int = 0
    _keys: Tensor | None = field(default=None, repr=False)
    _values: Tensor | None = field(default=None, repr=False)

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``[batch, new, kv_heads, head_dim]``; returns all there is."""
        if self._keys is None or self._values is None:
            shape = (key.shape[0], self.capacity, *key.shape[2:])
            self._keys, self._values = key.new_empty(shape), value.new_empty(shape)
        end = self.length + key.shape[1]
        self._keys[:, self.length : end] = key
        self._values[:, self.length : end] = value
        self.length = end
        return self._keys[:, :end], self._values[:, :end]


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
        self.o_proj = Linear(config.query_size, hidden, bias=config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        documents: Documents | None = None,
        cache: LayerCache | None = None,
        *,
        norm: RMSNorm,
    ) -> Tensor:
        """``[batch, seq, hidden]`` to the same shape; position ``i`` sees positions up to ``i``.

        Args:
            x: hidden states, before their norm.
            rotation: of the positions of ``x``.
            documents: keep positions within their document or window.
            cache: positions before those of ``x``, which are appended to it.
            norm: what the projections read ``x`` through.
        """
        heads = (*x.shape[:-1], -1, self.head_dim)
        projections = project_normed(x, norm, (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = (projection.view(heads) for projection in projections)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is not None:
            key, value = cache.extend(key, value)
        window = self.sliding_window
        if documents is None:
            mixed = causal_attention(query, key, value, window=window)
        else:
            causal = functools.partial(causal_attention, window=window, mask=documents.band)
            mixed = attend_documents(query, key, value, documents=documents, causal=causal, window=window)
        return self.o_proj(mixed.flatten(2))  # type: ignore[no-any-return]


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, window: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """Causal attention of ``[batch, new, heads, head_dim]`` over keys and values with fewer heads.

    Args:
        query: ``[batch, new, heads, head_dim]``, the last positions of the sequence.
        key: ``[batch, seq, kv_heads, head_dim]``; head ``h`` of the query reads KV head
            ``h // (heads / kv_heads)``.
        value: like ``key``.
        window: a position sees only the last ``window`` positions up to its own.
        mask: that window as ``[new, seq]``, where it was made before.

    Returns:
        ``[batch, new, heads, head_dim]``.
    """
    new, length = query.shape[1], key.shape[1]
    if new == 1 and window is not None:
        key, value = key[:, -window:], value[:, -window:]
    windowed = new > 1 and window is not None and window < length
    masked = windowed or 1 < new < length
    if not masked and cpu_attention.has_causal_attention(query, key):
        return cpu_attention.causal_attention(query, key, value)
    if masked and mask is None:
        mask = band(new, length, window or length, query.device)
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask if masked else None,
        is_causal=not masked and new > 1,
        enable_gqa=key.shape[2] != query.shape[2],
    )
    return mixed.transpose(1, 2)
