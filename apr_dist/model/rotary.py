"""Rotary position embedding in split halves: frequencies and tables (arXiv:2104.09864).

Frequencies are stretched as the configuration's ``rope_scaling`` says, by the formulas of its
sources. Angles, cosines and the rotation itself, which is a kernel, are f32 whatever the type of the model.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from apr_dist.model.config import TransformerConfig
from apr_dist.model.rope_scaling import RopeScaling, RopeScalingType


class Rotation(NamedTuple):
    """Cosines and sines of a batch's positions, each f32 ``[1 or batch, seq, 1, rotary_dim / 2]``.

    ``query_scale`` is what queries are multiplied by, f32 ``[1 or batch, seq, 1, 1]``; None: by nothing.
    """

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None = None


class RotaryEmbedding(nn.Module):
    """Positions to rotations. Its buffers are not saved; ``reset`` computes them again.

    ``frequencies`` are those of a sequence up to the original length, ``long_frequencies`` of a longer one.
    """

    frequencies: Tensor
    long_frequencies: Tensor | None

    def __init__(self, config: TransformerConfig, *, local: bool = False) -> None:
        super().__init__()
        self._config, self._local = config, local
        self._scaling = None if local else config.rope_scaling
        self.attention_factor = self._scaling.rotation_factor if self._scaling else 1.0
        # Computed on the meta device they would load PyTorch's compiler, for nothing (seconds).
        device = torch.get_default_device()
        long = self._scaling is not None and self._scaling.rope_type is RopeScalingType.LONGROPE
        self.register_buffer("frequencies", self._on_cpu().to(device), persistent=False)
        more = self._on_cpu(long=True).to(device) if long else None
        self.register_buffer("long_frequencies", more, persistent=False)

    def _on_cpu(self, *, long: bool = False) -> Tensor:
        with torch.device("cpu"):
            return inverse_frequencies(self._config, local=self._local, long=long)

    def reset(self) -> None:
        """Compute the frequencies again, in place; needed after ``to_empty``."""
        self.frequencies.copy_(self._on_cpu())
        if self.long_frequencies is not None:
            self.long_frequencies.copy_(self._on_cpu(long=True))

    def forward(self, position_ids: Tensor, lengths: Tensor | None = None) -> Rotation:
        """Integer positions ``[1 or batch, seq]`` to their rotations.

        Args:
            position_ids: the positions.
            lengths: tokens of the sequence that each position is of, ``[1 or batch, 1 or seq]``; None: each
                row is one, up to its last position.
        """
        positions = position_ids[..., None].float()
        angles = (positions * self._frequencies_of(position_ids, lengths)).unsqueeze(2)
        cos, sin = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
        beta, scaling = self._config.llama_4_scaling_beta, self._config.rope_scaling
        if beta is None or scaling is None:
            return Rotation(cos, sin)
        turns = torch.floor(position_ids / (scaling.original_max_position_embeddings or 1))
        return Rotation(cos, sin, (1.0 + beta * torch.log(1.0 + turns))[..., None, None])

    def _frequencies_of(self, position_ids: Tensor, lengths: Tensor | None) -> Tensor:
        """Those of each position's sequence: f32 ``[rotary_dim / 2]``, or that after ``[batch, seq]``."""
        frequencies, scaling = self.frequencies.float(), self._scaling
        if scaling is None or not scaling.by_length:
            return frequencies
        if lengths is None:
            lengths = position_ids.amax(dim=-1, keepdim=True) + 1
        if self.long_frequencies is None:
            return _dynamic(lengths, scaling, self._config)
        longer = lengths[..., None] > (scaling.original_max_position_embeddings or 0)
        return torch.where(longer, self.long_frequencies.float(), frequencies)


def inverse_frequencies(config: TransformerConfig, *, local: bool = False, long: bool = False) -> Tensor:
    """Radians per token of each pair of rotated dimensions, f32 ``[rotary_dim / 2]``, after scaling.

    With ``local`` those of layers with a window, where these have a base of their own and no scaling; with
    ``long`` those of sequences beyond the original length, where these have their own.
    """
    exponents = _exponents(config)
    if local:
        return torch.as_tensor(1.0 / (config.rope_local_theta or config.rope_theta) ** exponents)
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type is RopeScalingType.LONGROPE:
        factors = torch.tensor((scaling.long_factor if long else scaling.short_factor) or ())
        return 1.0 / (factors * config.rope_theta**exponents)
    frequencies = 1.0 / config.rope_theta**exponents
    if scaling is None or scaling.rope_type is RopeScalingType.DYNAMIC:
        return frequencies
    if scaling.rope_type is RopeScalingType.LINEAR:
        return frequencies / scaling.factor
    if scaling.rope_type is RopeScalingType.LLAMA3:
        return _llama3(frequencies, scaling)
    return _yarn(frequencies, scaling, config)


def _exponents(config: TransformerConfig) -> Tensor:
    return torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim


def _dynamic(lengths: Tensor, scaling: RopeScaling, config: TransformerConfig) -> Tensor:
    """NTK-aware scaling whose base grows with sequences beyond ``max_position_embeddings``."""
    size, limit = config.rotary_dim, config.max_position_embeddings
    stretch = scaling.factor * lengths.clamp(min=limit) / limit - (scaling.factor - 1.0)
    base = config.rope_theta * stretch ** (size / (size - 2))
    exponents = _exponents(config).to(lengths.device)
    return torch.as_tensor(1.0 / base[..., None] ** exponents)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between blended."""
    low, high, original = (
        scaling.low_freq_factor or 0.0,
        scaling.high_freq_factor or 0.0,
        scaling.original_max_position_embeddings or 0,
    )
    turns = original * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(frequencies: Tensor, scaling: RopeScaling, config: TransformerConfig) -> Tensor:
    """YaRN (arXiv:2309.00071, section 3.2): interpolate dimensions that turn seldom, keep the fast ones."""
    original = scaling.original_max_position_embeddings or 0
    size = config.rotary_dim

    def dimension(turns: float) -> float:
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    if first == last:
        last += 0.001
    stretched = ((torch.arange(size // 2, dtype=torch.float32) - first) / (last - first)).clamp(0.0, 1.0)
    return frequencies / scaling.factor * stretched + frequencies * (1.0 - stretched)
