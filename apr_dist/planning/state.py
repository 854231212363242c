"""Bytes of what is trained, by how it is stored and where, from dimensions alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from apr_dist.choices import GradientStorage, Offload, Strategy, WeightStorage
from apr_dist.model.adapters import Adapter
from apr_dist.model.config import TransformerConfig
from apr_dist.parallel.storage import PLAIN, Storage
from apr_dist.parallel.stored_bytes import BF16, F32, stored_bytes, trained_count, weight_bytes
from apr_dist.parallel.strategy import possible_offloads

CHUNK = 1 << 20
"""Elements of a chunk of a streamed update, as in ``parallel.split_weights``, which needs PyTorch."""


ROUNDING = 24
"""Bytes an element of what rounding at random makes on its way."""


def update_bytes(storage: Storage, state_bits: int, *, streams: bool) -> int:
    """What an update holds of one chunk: f32 values and gradient, and what is made of them on the way.

    Where it streams, three chunks' gradients, low bits and moments are on the device: one that comes, one
    that is computed, one that leaves.
    """
    computed = 2 * F32
    if storage.weights is not WeightStorage.F32:
        computed += ROUNDING  # or, of split weights, patterns and what finds ties
    moved = BF16 if storage.gradients is GradientStorage.BF16 else F32
    moved += BF16 if storage.weights is WeightStorage.SPLIT else 0
    moved += 2 * F32 if state_bits == 32 else 2
    return CHUNK * (computed + (3 * moved if streams else 0))


def most_possible(strategy: Strategy, offload: Offload) -> Offload:
    """Of what is to lie in host memory as much as the strategy can keep there."""
    order = list(Offload)
    can = possible_offloads(strategy)
    return max((one for one in can if order.index(one) <= order.index(offload)), key=order.index)


@dataclass(frozen=True, kw_only=True)
class State:
    """Bytes of what is trained: where the process computes, and in host memory where it is offloaded.

    ``tests/test_parallel_state.py`` compares it with what real ranks hold under each strategy and offload.

    Attributes:
        weights: of this process, without what is gathered.
        low: the bits that split weights lost.
        gradients: at the end of backward.
        optimizer: both moments.
        masters: the f32 weights that DeepSpeed updates.
        buckets: through which gradients leave.
        host_parts: what is offloaded, with the buffers it travels through, by part.
    """

    weights: int
    low: int
    gradients: int
    optimizer: int
    masters: int
    buckets: int
    host_parts: Mapping[str, int]

    @property
    def host(self) -> int:
        """Everything that is offloaded."""
        return sum(self.host_parts.values())

    @classmethod
    def of(
        cls,
        model: TransformerConfig,
        parts: Shards,
        strategy: Strategy,
        offload: Offload,
        state_bits: int = 32,
        storage: Storage = PLAIN,
        adapter: Adapter | None = None,
    ) -> State:
        """Of one process of the strategy."""
        zero = strategy.zero_stage > 0
        storage = replace(storage, offload=offload)
        if not zero and offload is not Offload.OPTIMIZER_AND_PARAMETERS:
            return cls._stored(model, parts, strategy, storage, state_bits, adapter)
        whole, rows = F32 * trained_count(model, adapter), parts.by_rows(model, strategy)
        weights = int(weight_bytes(model, adapter) * rows.weights)
        gradients, share = int(whole * rows.gradients), int(whole * rows.optimizer)
        if offload is Offload.NONE:
            return cls(
                weights=weights,
                low=0,
                gradients=gradients,
                optimizer=2 * share,
                masters=share,
                buckets=0,
                host_parts={},
            )
        if not zero:  # FSDP2
            state = {"weights": weights, "gradients": share, "moments": 2 * share}
            return cls(weights=0, low=0, gradients=0, optimizer=0, masters=0, buckets=0, host_parts=state)
        # Masters, moments, the masters' gradients; and a buffer through which weights (ZeRO-1, ZeRO-2) or
        # gradients (ZeRO-3) travel. ZeRO-1 and ZeRO-2 send one gradient at a time, by way of two buffers.
        largest = F32 * max(math.prod(shape) for _, shape, _ in model.kinds_of_parameters())
        sent = largest if strategy is not Strategy.ZERO3 else 0
        both = offload is Offload.OPTIMIZER_AND_PARAMETERS
        return cls(
            weights=0 if both else weights,
            low=0,
            gradients=gradients if strategy is Strategy.ZERO1 else 0,
            optimizer=0,
            masters=0,
            buckets=sent,
            host_parts={
                "masters": share,
                "moments": 2 * share,
                "gradients": share,
                "buffer": share + sent,
                **({"weights": weights} if both else {}),
            },
        )

    @classmethod
    def _stored(
        cls,
        model: TransformerConfig,
        parts: Shards,
        strategy: Strategy,
        storage: Storage,
        state_bits: int,
        adapter: Adapter | None,
    ) -> State:
        """Of one process, DDP or FSDP2, whose parameters are not in host memory."""
        found, rows = (
            stored_bytes(model, strategy, storage, state_bits, adapter),
            parts.by_rows(model, strategy),
        )
        streams = storage.streams(strategy)
        weights, low = int(found.weights * rows.weights), int(found.low * rows.weights)
        gradients, moments = int(found.gradients * rows.gradients), int(found.moments * rows.optimizer)
        leaving = {"low bits": low, "gradients": gradients, "moments": moments}
        return cls(
            weights=weights,
            low=0 if streams else low,
            gradients=0 if streams else gradients,
            optimizer=0 if streams else moments,
            masters=0,
            buckets=gradients if strategy is Strategy.DDP and not storage.is_own(strategy) else 0,
            host_parts={name: size for name, size in leaving.items() if size} if streams else {},
        )


@dataclass(frozen=True)
class Shards:
    """Into how many parts each kind of state is cut."""

    weights: int
    gradients: int
    optimizer: int

    def by_rows(self, model: TransformerConfig, strategy: Strategy) -> Shares:
        """What of each kind of state lies with rank 0.

        FSDP2 cuts every parameter between rows of its first dimension, the larger parts first; ZeRO cuts a
        flat buffer evenly.
        """
        if strategy.zero_stage > 0:
            return Shares(*(Fraction(1, parts) for parts in (self.weights, self.gradients, self.optimizer)))
        kinds = [(shape[0], math.prod(shape) * count) for _, shape, count in model.kinds_of_parameters()]
        elements = sum(count for _, count in kinds)

        def share(parts: int) -> Fraction:
            held = sum(Fraction(-(-rows // parts) * count, rows) for rows, count in kinds)
            return Fraction(held, elements)

        return Shares(share(self.weights), share(self.gradients), share(self.optimizer))


@dataclass(frozen=True)
class Shares:
    """What part of each kind of state the rank with the most of it holds."""

    weights: Fraction
    gradients: Fraction
    optimizer: Fraction


def shards(strategy: Strategy, world: int, shard_size: int) -> Shards:
    """How the strategy cuts the state over ``world`` processes, ``shard_size`` of which share a copy."""
    if strategy in {Strategy.FSDP2, Strategy.SHARD_GRAD_OP, Strategy.ZERO3}:
        return Shards(world, world, world)
    if strategy is Strategy.HSDP:
        return Shards(shard_size, shard_size, shard_size)
    if strategy is Strategy.ZERO2:
        return Shards(1, world, world)
    return Shards(1, 1, world if strategy is Strategy.ZERO1 else 1)
