"""Quantised payloads to float32: AprQ4, AprQ8 and the GGUF super-blocks Q4_K and Q6_K.

Reading only: new files are never written quantised. Each function takes the raw payload of whole
blocks (uint8) and returns float32 values, padding included; ``dequantize`` cuts it to the shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from apr_dist.apr.layout import BLOCKS, DType, TensorEntry
from apr_dist.apr.structure import rows_are_padded

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_CHUNK_BLOCKS = 1 << 14  # bounds the temporaries, whatever the tensor's size


def dequantize(entry: TensorEntry, payload: Bytes) -> Floats:
    """The tensor's values as float32 of ``entry.shape``, from its payload (uint8, 1-D)."""
    if entry.dtype is DType.APR_Q8:
        return _apr_q8(payload).reshape(entry.shape)
    values, size = BLOCKS[entry.dtype]
    blocks = payload.reshape(-1, size)
    unpacked = np.empty((len(blocks), values), np.float32)
    for start in range(0, len(blocks), _CHUNK_BLOCKS):
        chunk = blocks[start : start + _CHUNK_BLOCKS]
        with np.errstate(all="ignore"):  # a scale that is not finite shows in the values
            unpacked[start : start + _CHUNK_BLOCKS] = _UNPACK[entry.dtype](chunk)
    if rows_are_padded(entry):
        rows, columns = math.prod(entry.shape[:-1]), entry.shape[-1]
        return unpacked.reshape(rows, -1)[:, :columns].reshape(entry.shape)
    return unpacked.reshape(-1)[: entry.num_elements].reshape(entry.shape)


def _apr_q8(payload: Bytes) -> Floats:
    """One f32 scale for the tensor, then one i8 a value."""
    if not payload.size:
        return np.empty(0, np.float32)
    values = payload[4:].view(np.int8).astype(np.float32)
    with np.errstate(all="ignore"):
        values *= payload[:4].view(np.float32)
    return values


def _apr_q4(blocks: Bytes) -> Floats:
    """f16 scale, 16 bytes of nibbles (low first); an unusable scale counts as 0."""
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    usable = np.isfinite(scale) & (np.abs(scale) >= np.finfo(np.float16).smallest_normal)
    nibbles = np.stack((blocks[:, 2:] & 15, blocks[:, 2:] >> 4), axis=-1).reshape(len(blocks), 32)
    return (nibbles.astype(np.float32) - 8) * np.where(usable, scale, 0)


def _q4_k(blocks: Bytes) -> Floats:
    """Scale d and minimum dmin (f16), 12 bytes of packed 6-bit scales and minima, 128 bytes of nibbles.

    Eight sub-blocks of 32: value = d * scale * nibble - dmin * minimum. Each 32 bytes of nibbles
    hold two sub-blocks, the low nibbles first.
    """
    count = len(blocks)
    d, dmin = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    low, mid, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = np.concatenate((low & 63, (high & 15) | (low >> 6 << 4)), axis=1)
    minimum = np.concatenate((mid & 63, (high >> 4) | (mid >> 6 << 4)), axis=1)
    nibbles = blocks[:, 16:].reshape(count, 4, 1, 32)
    quants = np.concatenate((nibbles & 15, nibbles >> 4), axis=2).reshape(count, 8, 32)
    result = (d * scale)[:, :, None] * quants - (dmin * minimum)[:, :, None]
    return result.astype(np.float32, copy=False).reshape(count, 256)


def _q6_k(blocks: Bytes) -> Floats:
    """128 bytes of low nibbles, 64 of high bit pairs, 16 i8 scales, d (f16); 16 values a scale."""
    count = len(blocks)
    low = blocks[:, :128].reshape(count, 2, 1, 64)
    low = np.concatenate((low & 15, low >> 4), axis=2).reshape(count, 2, 4, 32)
    pairs = blocks[:, 128:192].reshape(count, 2, 1, 32)
    high = (pairs >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)) & 3
    quants = (low | (high << 4)).astype(np.float32) - 32
    scale = blocks[:, 192:208].copy().view(np.int8).astype(np.float32)
    d = blocks[:, 208:210].copy().view(np.float16).astype(np.float32)
    return ((d * scale)[:, :, None] * quants.reshape(count, 16, 16)).reshape(count, 256)


_UNPACK: Final[Mapping[DType, Callable[[Any], Floats]]] = {
    DType.APR_Q4: _apr_q4,
    DType.Q4_K: _q4_k,
    DType.Q6_K: _q6_k,
}
