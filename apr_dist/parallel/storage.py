"""Which trained tensors are stored in fewer bits than f32, and where that can be; no PyTorch.

The rungs of the memory ladder are values of configuration keys: ``memory.weights``, ``memory.gradients``,
``optimizer.state_bits``, ``parallel.offload`` and ``compute.activation_checkpointing``. Which parameters are
trained at all is another question, which ``requires_grad`` answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apr_dist.choices import GradientStorage, Offload, Precision, Strategy, WeightStorage
from apr_dist.errors import UsageError

WEIGHTS, GRADIENTS, PRECISION = "--memory.weights", "--memory.gradients", "--parallel.precision"

EMBEDDING = "model.embed_tokens.weight"
"""The parameter that is looked up in f32, and whose gradient is added up in f32."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How the trained tensors of a run are stored.

    Attributes:
        weights: of a matrix.
        gradients: of a matrix, between backward and update.
        offload: what is in host memory.
    """

    weights: WeightStorage = WeightStorage.F32
    gradients: GradientStorage = GradientStorage.F32
    offload: Offload = Offload.NONE

    @property
    def is_plain(self) -> bool:
        """Whether weights and gradients are f32."""
        return self.weights is WeightStorage.F32 and self.gradients is GradientStorage.F32

    def streams(self, strategy: Strategy) -> bool:
        """Whether our own engine moves gradients, low bits and moments to host memory and back."""
        return strategy in _REPLICAS and self.offload is Offload.OPTIMIZER

    def is_own(self, strategy: Strategy) -> bool:
        """Whether our own engine of one process and DDP is needed, in place of PyTorch's."""
        return strategy in _REPLICAS and (not self.is_plain or self.streams(strategy))


PLAIN = Storage()
"""f32 on the device."""

_REPLICAS = (Strategy.SINGLE, Strategy.DDP)


def is_narrow(name: str, shape: Sequence[int], strategy: Strategy, weights: WeightStorage) -> bool:
    """Whether a parameter is stored as bf16, with the bits that lost or without.

    FSDP2 computes with the bf16 rounding of every parameter. Elsewhere norms, biases and the embedding are
    read in f32. Norms and biases stay f32; so does the embedding where weights are split, so that the run is
    the one with f32 weights.
    """
    if weights is WeightStorage.F32:
        return False
    if strategy.is_fsdp:
        return True
    return len(shape) >= 2 and (name != EMBEDDING or weights is not WeightStorage.SPLIT)


def has_bf16_gradient(shape: Sequence[int], strategy: Strategy, gradients: GradientStorage) -> bool:
    """Whether a parameter's gradient is stored as bf16: that of a matrix, where nothing is sharded."""
    return gradients is GradientStorage.BF16 and not strategy.is_fsdp and len(shape) >= 2


def refuse_storage(strategy: Strategy, storage: Storage, precision: Precision) -> None:
    """Store trained tensors only as the strategy can.

    Raises:
        UsageError: naming what can.
    """
    if storage.is_plain:
        return
    key, value = (
        ("weights", storage.weights)
        if storage.weights is not WeightStorage.F32
        else ("gradients", storage.gradients)
    )
    flag = f"--memory.{key}"
    if strategy.zero_stage:
        raise UsageError(
            f"memory.{key} is {value} under strategy {strategy}, whose engine keeps f32 masters of its own",
            where=flag,
            expected="one process, ddp, fsdp2, shard-grad-op or hsdp",
            remedy=f"use --parallel.strategy fsdp2, or {flag} f32",
        )
    if precision is not Precision.BF16:
        raise UsageError(
            f"memory.{key} is {value} and parallel.precision is {precision}",
            where=flag,
            expected="bf16 arithmetic, which reads the bf16 rounding of a weight and gives bf16 gradients",
            remedy=f"add {PRECISION} bf16, or use {flag} f32",
        )
    if strategy.is_fsdp and storage.gradients is GradientStorage.BF16:
        raise UsageError(
            f"memory.gradients is bf16 under strategy {strategy}",
            where=GRADIENTS,
            expected="one process or ddp: a sharded gradient is the f32 that reducing it gives",
            remedy=f"use {GRADIENTS} f32",
        )
    if strategy.is_fsdp and storage.offload is not Offload.NONE:
        raise UsageError(
            f"memory.weights is {storage.weights} under strategy {strategy} with {storage.offload} offloaded",
            where=WEIGHTS,
            expected="nothing offloaded under FSDP2",
            remedy=f"use --parallel.offload none, or {WEIGHTS} f32",
        )
