"""How two files differ (``diff``): metadata key by key, tensors value by value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.gates.adapters import STATED
from apr_dist.gates.model_file import prove_model
from apr_dist.interop.convert import CHUNK_ELEMENTS, Progress, one_by_one


@dataclass(frozen=True, kw_only=True)
class TensorDiff:
    """A tensor that both files have and that differs.

    Attributes:
        name: its name.
        dtypes: of the first and the second file.
        shapes: of the first and the second file.
        max_abs: largest absolute difference; None when the shapes differ.
        relative: ``max_abs`` over the first tensor's largest absolute value; 0 when both are zero.
        cosine: cosine of the angle between the two as vectors; 1 when both are zero.
    """

    name: str
    dtypes: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    max_abs: float | None = None
    relative: float | None = None
    cosine: float | None = None


@dataclass(frozen=True, kw_only=True)
class FileDiff:
    """All differences between two files.

    Attributes:
        first: one file.
        second: the other.
        metadata: key, value in the first, value in the second (None when absent).
        only_first: tensors that only the first has.
        only_second: tensors that only the second has.
        tensors: tensors that both have and that differ.
        identical: tensors that are the same byte for byte.
    """

    first: Path
    second: Path
    metadata: tuple[tuple[str, Any, Any], ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    tensors: tuple[TensorDiff, ...]
    identical: int

    @property
    def equal(self) -> bool:
        """Whether there is no difference at all."""
        return not (self.metadata or self.only_first or self.only_second or self.tensors)


def diff_files(first: Path, second: Path, *, progress: Progress | None = None) -> FileDiff:
    """Compare two APR files, of models or of adapters.

    Args:
        first: one file.
        second: the other.
        progress: called with (bytes compared, bytes in all).

    Raises:
        ModelFileError: one of them cannot be read.
        GateRefused: training would refuse one of them.
    """
    with AprReader(first) as one, AprReader(second) as other:
        if not all(STATED in reader.metadata.custom for reader in (one, other)):  # two adapters are compared
            prove_model(one)
            prove_model(other)
        shared = [name for name in one.tensors if name in other.tensors]
        found: list[TensorDiff] = []
        for name in one_by_one({name: one.tensors[name] for name in shared}, progress):
            difference = _compare(one, other, name)
            if difference is not None:
                found.append(difference)
            one.forget(name)
            other.forget(name)
        return FileDiff(
            first=one.path,
            second=other.path,
            metadata=_metadata(one.metadata, other.metadata),
            only_first=tuple(name for name in one.tensors if name not in other.tensors),
            only_second=tuple(name for name in other.tensors if name not in one.tensors),
            tensors=tuple(found),
            identical=len(shared) - len(found),
        )


def _metadata(first: AprMetadata, second: AprMetadata) -> tuple[tuple[str, Any, Any], ...]:
    one, other = first.to_mapping(), second.to_mapping()
    keys = [*one, *(key for key in other if key not in one)]
    return tuple((key, one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key))


def _compare(one: AprReader, other: AprReader, name: str) -> TensorDiff | None:
    left, right = one.tensors[name], other.tensors[name]
    kinds, shapes = (left.dtype.name, right.dtype.name), (left.shape, right.shape)
    if left.shape != right.shape:
        return TensorDiff(name=name, dtypes=kinds, shapes=shapes)
    if left.dtype is right.dtype and np.array_equal(
        np.frombuffer(one.raw(name), np.uint8), np.frombuffer(other.raw(name), np.uint8)
    ):
        return None
    largest = scale = dot = first_square = second_square = 0.0
    flat = [reader.float32(name).reshape(-1) for reader in (one, other)]
    for start in range(0, flat[0].size, CHUNK_ELEMENTS):
        a, b = (values[start : start + CHUNK_ELEMENTS].astype(np.float64) for values in flat)
        with np.errstate(invalid="ignore", over="ignore"):
            largest = max(largest, float(np.abs(a - b).max(initial=0)))
            scale = max(scale, float(np.abs(a).max(initial=0)))
            dot += float(a @ b)
            first_square += float(a @ a)
            second_square += float(b @ b)
    norms = math.sqrt(first_square) * math.sqrt(second_square)
    return TensorDiff(
        name=name,
        dtypes=kinds,
        shapes=shapes,
        max_abs=largest,
        relative=largest / scale if scale else (0.0 if largest == 0 else math.inf),
        cosine=dot / norms if norms else (1.0 if first_square == second_square else 0.0),
    )
