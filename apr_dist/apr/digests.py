"""Digests of weights: of one tensor's values, and of a whole model by its names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from apr_dist.apr.reader import AprReader


def values_digest(values: npt.NDArray[Any]) -> str:
    """XXH3-128 of an array's bytes in memory order."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(values).data)


def weights_digest(tensors: Mapping[str, str]) -> str:
    """``sha256:...`` over the names and digests of all tensors: the identity of the weights."""
    lines = "\n".join(f"{name} {value}" for name, value in sorted(tensors.items()))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def file_weights_digest(reader: AprReader) -> str:
    """``weights_digest`` of a file's tensors, as the f32 values they stand for."""
    found = {}
    for name in reader.tensors:
        found[name] = values_digest(reader.float32(name))
        reader.forget(name)
    return weights_digest(found)
