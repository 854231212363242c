"""Rounding f32 to bf16 at random, as a pure function of seed, step, tensor and element.

Rounding to nearest loses every update smaller than half a unit in the last place, always. Rounding up with a
probability of the share that is above loses none on average. Here the random number of an element is a hash
of its place in the whole tensor under a key of seed, step and name: the same on every device, under every
split over ranks, and after a resume.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def key_of(seed: int, step: int, name: str) -> int:
    """A 32-bit key for one rounding of one tensor."""
    digest = hashlib.blake2b(f"{seed}:{step}:{name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def random_words(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Hashes, int64 from 0 to 2**32 - 1, of the elements from ``start`` on, ``[count]``.

    The mixing steps are those of Wellons' two-round 32-bit hash; both factors are below 2**31, so that no
    product leaves the 63 bits in which every device computes alike.
    """
    word = torch.arange(start, start + count, dtype=torch.int64, device=device)
    if start + count > _WORD:
        word = (word ^ (word >> 32) * 0x9E3779B1).bitwise_and_(_WORD)
    word.bitwise_xor_(key)
    word.bitwise_xor_(word >> 16).mul_(0x21F0AAAD).bitwise_and_(_WORD)
    word.bitwise_xor_(word >> 15).mul_(0x735A2D97).bitwise_and_(_WORD)
    return word.bitwise_xor_(word >> 15)


def round_stochastically(values: Tensor, *, key: int, start: int) -> Tensor:
    """f32 ``[n]`` to bf16 ``[n]``: down or up, on average the value itself; infinities and NaN as they are.

    Args:
        values: flat.
        key: of this rounding, see `key_of`.
        start: place of the first element in its whole tensor.
    """
    low = (random_words(key, start, values.numel(), values.device) >> 16).to(torch.int32)
    patterns = (values.view(torch.int32) + low) & -0x10000
    rounded = patterns.view(torch.float32).bfloat16()
    return torch.where(values.isfinite(), rounded, values.bfloat16())
