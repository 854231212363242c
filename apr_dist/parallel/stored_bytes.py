"""Bytes of what is trained, by how it is stored, from dimensions alone; no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from apr_dist.choices import Offload, Strategy, WeightStorage
from apr_dist.model.adapters import Adapter
from apr_dist.model.config import TransformerConfig
from apr_dist.parallel.state_bits import BLOCK, can_have, is_eligible
from apr_dist.parallel.storage import Storage, has_bf16_gradient, is_narrow

F32, BF16 = 4, 2


@dataclass(frozen=True)
class StoredBytes:
    """Bytes of the whole model.

    Attributes:
        weights: what products read.
        low: the bits that split weights lost.
        gradients: of a step.
        moments: both.
        largest_gradient: of one parameter of a block in f32, which is on the device whole before it leaves.
    """

    weights: int
    low: int
    gradients: int
    moments: int
    largest_gradient: int


def stored_bytes(
    model: TransformerConfig,
    strategy: Strategy,
    storage: Storage,
    state_bits: int,
    adapter: Adapter | None = None,
) -> StoredBytes:
    """Of every trained tensor, stored as the strategy can; with an adapter, of frozen weights too."""
    if adapter is not None:
        shapes = adapter.shapes(model)
        return StoredBytes(
            weight_bytes(model, adapter),
            0,
            F32 * trained_count(model, adapter),
            _moments_of(_each_once(shapes), strategy, storage.offload, state_bits),
            F32 * max(map(math.prod, shapes.values())),
        )
    if strategy.zero_stage:
        storage = Storage(offload=storage.offload)
    weights = low = gradients = 0
    for name, shape, times in model.kinds_of_parameters():
        count, narrow = math.prod(shape) * times, is_narrow(name, shape, strategy, storage.weights)
        weights += count * (BF16 if narrow else F32)
        low += count * BF16 if narrow and storage.weights is WeightStorage.SPLIT else 0
        gradients += count * (BF16 if has_bf16_gradient(shape, strategy, storage.gradients) else F32)
    largest = max(math.prod(shape) for name, shape, _ in model.kinds_of_parameters() if ".layers." in name)
    moments = moment_bytes(model, strategy, storage.offload, state_bits)
    return StoredBytes(weights, low, gradients, moments, F32 * largest)


def moment_bytes(model: TransformerConfig, strategy: Strategy, offload: Offload, state_bits: int) -> int:
    """Both moments of the whole model; in 8 bits a byte an element and 4 for each block."""
    return _moments_of(model.kinds_of_parameters(), strategy, offload, state_bits)


def trained_count(model: TransformerConfig, adapter: Adapter | None) -> int:
    """Elements that have a gradient and moments."""
    return model.parameter_count() if adapter is None else sum(map(math.prod, adapter.shapes(model).values()))


def weight_bytes(model: TransformerConfig, adapter: Adapter | None) -> int:
    """Bytes of all weights in f32, those of an adapter beside those that are frozen."""
    if adapter is None:
        return F32 * model.parameter_count()
    frozen = sum(adapter.base_bytes(name, shape) for name, shape in model.parameter_shapes().items())
    return frozen + F32 * trained_count(model, adapter)


Kinds = Iterable[tuple[str, tuple[int, ...], int]]


def _each_once(shapes: Mapping[str, tuple[int, ...]]) -> Kinds:
    return ((name, shape, 1) for name, shape in shapes.items())


def _moments_of(kinds: Kinds, strategy: Strategy, offload: Offload, state_bits: int) -> int:
    eight = state_bits == 8 and can_have(strategy, offload)
    total = 0
    for name, shape, times in kinds:
        count = math.prod(shape)
        is_short = eight and is_eligible(name, shape)
        total += times * (count + F32 * -(-count // BLOCK) if is_short else F32 * count)
    return 2 * total
