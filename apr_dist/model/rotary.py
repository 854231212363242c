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
    """Cosines and sines of a batch's positions, each f32 ``[1 or batch, seq, 1, rotary_dim / 2]``."""

    cos: Tensor
    sin: Tensor


class RotaryEmbedding(nn.Module):
    """Positions to rotations. Its one buffer is not saved; ``reset`` computes it again."""

    frequencies: Tensor

    def __init__(self, config: TransformerConfig, *, local: bool = False) -> None:
        super().__init__()
        self._config, self._local = config, local
        self.attention_factor = 1.0 if local else attention_factor(config.rope_scaling)
        # Computed on the meta device they would load PyTorch's compiler, for nothing (seconds).
        frequencies = self._on_cpu().to(torch.get_default_device())
        self.register_buffer("frequencies", frequencies, persistent=False)

    def _on_cpu(self) -> Tensor:
        with torch.device("cpu"):
            return inverse_frequencies(self._config, local=self._local)

    def reset(self) -> None:
        """Compute the frequencies again, in place; needed after ``to_empty``."""
        self.frequencies.copy_(self._on_cpu())

    def forward(self, position_ids: Tensor) -> Rotation:
        """Integer positions ``[1 or batch, seq]`` to their rotations."""
        angles = (position_ids[..., None].float() * self.frequencies.float()).unsqueeze(2)
        return Rotation(angles.cos() * self.attention_factor, angles.sin() * self.attention_factor)


def inverse_frequencies(config: TransformerConfig, *, local: bool = False) -> Tensor:
    """Radians per token of each pair of rotated dimensions, f32 ``[rotary_dim / 2]``, after scaling.

    With ``local`` those of layers with a window, where these have a base of their own and no scaling.
    """
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
    if local:
        return torch.as_tensor(1.0 / (config.rope_local_theta or config.rope_theta) ** exponents)
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type is RopeScalingType.LINEAR:
        return frequencies / scaling.factor
    if scaling.rope_type is RopeScalingType.LLAMA3:
        return _llama3(frequencies, scaling)
    return _yarn(frequencies, scaling, config)


def attention_factor(scaling: RopeScaling | None) -> float:
    """What cosines and sines are multiplied by: ``0.1 ln(factor) + 1`` for YaRN (its equation 22), else 1."""
    if scaling is None or scaling.rope_type is not RopeScalingType.YARN:
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0


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
