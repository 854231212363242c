"""What the decoder is computed with: one interface, the sets that implement it, and the choice among them.

``plain`` is the interface and its plain PyTorch implementation, for any device and for the compiler; ``cpu``
and ``cuda`` override what they compute better. ``choice`` decides, and nothing else asks for a device. What a
block computes is in ``layers``, ``attention`` and ``transformer``, one package up. Imports no PyTorch here.
"""

from __future__ import annotations

from enum import StrEnum


class KernelChoice(StrEnum):
    """Which set of kernels computes the decoder; ``auto`` is the one made for the device."""

    AUTO = "auto"
    PLAIN = "plain"
    CPU = "cpu"
    CUDA = "cuda"
