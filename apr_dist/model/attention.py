"""Causal self-attention with grouped queries, one module for every family.

Projections and rotation are here. What mixes the positions, with its window and packed documents, is given: a
set of kernels makes it once per batch for all blocks (`Kernels.attention`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from apr_dist.model.config import TransformerConfig
from apr_dist.model.kernels.plain import Attend, Kernels
from apr_dist.model.layers import Computed, Linear, RMSNorm
from apr_dist.model.rotary import Rotation


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


class Attention(Computed):
    """q, k, v, o projections around causal attention; biases and q/k norms as the family has them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        hidden = config.hidden_size
        self.q_proj = Linear(hidden, config.query_size, bias=config.qkv_bias)
        self.k_proj = Linear(hidden, config.kv_size, bias=config.qkv_bias)
        self.v_proj = Linear(hidden, config.kv_size, bias=config.qkv_bias)
        self.o_proj = Linear(config.query_size, hidden, bias=config.attention_bias)
        self.q_norm = _norm(config, config.query_size) if config.qk_norm else None
        self.k_norm = _norm(config, config.kv_size) if config.qk_norm else None
        self.whole_norms = config.qk_norm_whole
        # Every way to attend divides by the root of the head's size; another scale is made of the query.
        self.query_factor = config.attention_scale * math.sqrt(config.head_dim)

    def forward(
        self, x: Tensor, rotation: Rotation | None, attend: Attend, cache: LayerCache | None = None
    ) -> Tensor:
        """``[batch, seq, hidden]`` to the same shape; position ``i`` sees positions up to ``i``.

        Args:
            x: hidden states.
            rotation: of the positions of ``x``; None: this block rotates nothing.
            attend: mixes the values of the positions that each one sees.
            cache: positions before those of ``x``, which are appended to it.
        """
        heads, kernels = (*x.shape[:-1], -1, self.head_dim), self.kernels_for(x)
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None and self.k_norm is not None and self.whole_norms:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.view(heads), key.view(heads), value.view(heads)
        if self.q_norm is not None and self.k_norm is not None and not self.whole_norms:
            query, key = self.q_norm(query), self.k_norm(key)
        if rotation is not None:
            query, key = _rotated(kernels, query, rotation), _rotated(kernels, key, rotation)
            if rotation.query_scale is not None:
                query = query * rotation.query_scale.to(query.dtype)
        if not math.isclose(self.query_factor, 1.0):
            query = query * self.query_factor
        if cache is not None:
            key, value = cache.extend(key, value)
        return self.o_proj(attend(query, key, value).flatten(2))  # type: ignore[no-any-return]


def _norm(config: TransformerConfig, width: int) -> RMSNorm:
    """The norm of q or k: over its whole width, or of each head."""
    size = width if config.qk_norm_whole else config.head_dim
    return RMSNorm(size, eps=config.rms_norm_eps, one_plus=config.one_plus_norms)


def _rotated(kernels: Kernels, x: Tensor, rotation: Rotation) -> Tensor:
    """``[batch, seq, heads, head_dim]`` whose first dimensions, as many as the rotation has, are rotated."""
    cos, sin = rotation.cos, rotation.sin
    turned = 2 * cos.shape[-1]
    if turned == x.shape[-1]:
        return kernels.rotate(x, cos, sin)
    return torch.cat((kernels.rotate(x[..., :turned], cos, sin), x[..., turned:]), dim=-1)
