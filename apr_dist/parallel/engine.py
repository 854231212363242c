"""One way to take a step, whatever the strategy: forward, backward, norm, clip, update.

An engine holds the prepared network and optimizer. The trainer sees only this face; every engine
averages gradients over the ranks, returns the global norm before clipping, and leaves the weights
alone when that norm is not a number, or when it is told to. Nothing here waits for a GPU, except where the
decision to update is the host's: in ZeRO's step, as DeepSpeed has it, and in that of moments in 8 bits.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from apr_dist.choices import Strategy, WeightStorage
from apr_dist.errors import DistributedError
from apr_dist.model.packing import Boundaries
from apr_dist.model.transformer import Decoder, DecoderBlock
from apr_dist.parallel.gradients import Gradients
from apr_dist.parallel.norm import global_norm, norm_of
from apr_dist.parallel.optimizer_shards import flat_parts
from apr_dist.parallel.runtime import Runtime, assert_wrapped
from apr_dist.parallel.sharded import as_fsdp, held_here
from apr_dist.parallel.sharding import assert_spread, keep_f32_gradients
from apr_dist.parallel.step_clock import StepClock, StepPart
from apr_dist.parallel.stored_adamw import StoredAdamW
from apr_dist.parallel.strategy import NOT_AS_ASKED
from apr_dist.parallel.zero import ask_for_input_gradients, vector_elements, zero_config
from apr_dist.parallel.zero_veto import Veto

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


class Engine(ABC):
    """A prepared network and optimizer.

    Attributes:
        optimizer: AdamW whose ``param_groups`` carry the rate that is used.
        evaluated: the network to evaluate through, which reads the weights being trained.
        evidence: what was found in memory: elements of the model and of each rank's share.
        clock: told here where a forward ends and its backward begins; who calls, tells it the rest.
    """

    optimizer: torch.optim.Optimizer
    evaluated: nn.Module
    evidence: dict[str, Any]
    clock: StepClock

    @abstractmethod
    def accumulate(
        self,
        inputs: Tensor,
        targets: Tensor,
        document_ids: Boundaries | None = None,
        *,
        scale: float | Tensor,
        last: bool,
    ) -> Tensor:
        """Forward and backward of one micro-batch, adding its gradients to those before it.

        Args:
            inputs: token ids ``[batch, seq]``.
            targets: next tokens ``[batch, seq]``.
            document_ids: where documents begin, which then attend to themselves only.
            scale: factor of the loss sum before backward; gradients are averaged over the ranks.
            last: whether it is the step's last one; its gradients are then complete over all ranks.

        Returns:
            the loss sum in nats, unscaled and without a graph.
        """

    @abstractmethod
    def step(self, hold: Tensor, norm_limit: float = math.inf) -> Tensor:
        """Clip, update and forget the gradients.

        Where ``hold`` is true or the norm is not a number or above its limit, nothing is updated: weights,
        moments and counters stay as they were.

        Args:
            hold: bool scalar on the device, the same on every rank.
            norm_limit: largest norm before clipping that is a step at all.

        Returns:
            the global gradient norm before clipping, a scalar on the device.
        """


def clip_share(norm: Tensor, grad_clip: float) -> Tensor:
    """What gradients of this norm are multiplied by, as `torch.nn.utils.clip_grad_norm_` does."""
    return (grad_clip / (norm + 1e-6)).clamp_(max=1.0)


def held_back(norm: Tensor, hold: Tensor, norm_limit: float) -> Tensor:
    """Whether a step of this norm changes nothing; a bool scalar where the norm is."""
    return hold.to(norm.device) | ~torch.isfinite(norm) | (norm > norm_limit)


class _TorchEngine(Engine):
    """What one process, DDP and FSDP2 have in common: PyTorch's own optimizer over local parameters."""

    def __init__(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, runtime: Runtime, grad_clip: float
    ) -> None:
        self._network, self._runtime, self.optimizer = network, runtime, optimizer
        self._grad_clip, self.clock = grad_clip, StepClock(runtime.device)

    def step(self, hold: Tensor, norm_limit: float = math.inf) -> Tensor:
        """See `Engine.step`."""
        parameters = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        gradients = [held_here(weight.grad) for weight in parameters if weight.grad is not None]
        norm = global_norm(gradients, self._runtime)
        share = clip_share(norm, self._grad_clip)
        if share.device.type != "cpu" or share < 1:  # to ask a GPU would be to wait for it
            torch._foreach_mul_(gradients, share.to(gradients[0].dtype))
        # AdamW reads this where its parameters are, as it does for loss scaling, and changes nothing.
        self.optimizer.found_inf = held_back(norm, hold, norm_limit).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.to(hold.device)


class ReplicaEngine(_TorchEngine):
    """One process, or DDP: Accelerate prepares the network."""

    def __init__(
        self, decoder: Decoder, optimizer: torch.optim.Optimizer, runtime: Runtime, grad_clip: float
    ) -> None:
        # It lies where it is computed; asked to see to that, Accelerate would load DTensor to ask for it.
        network = runtime.accelerator.prepare_model(decoder, device_placement=False)
        assert_wrapped(network, runtime.strategy)
        super().__init__(network, optimizer, runtime, grad_clip)
        self.evaluated = decoder
        self.evidence = {**assert_spread(decoder, runtime), "optimizer": type(optimizer).__name__}

    def accumulate(
        self,
        inputs: Tensor,
        targets: Tensor,
        document_ids: Boundaries | None = None,
        *,
        scale: float | Tensor,
        last: bool,
    ) -> Tensor:
        """See `Engine.accumulate`."""
        self._network.train()
        with contextlib.nullcontext() if last else self._runtime.accelerator.no_sync(self._network):
            loss_sum, _ = self._network(inputs, targets, document_ids=document_ids)
            self.clock.enter(StepPart.BACKWARD)
            (loss_sum * scale).backward()
        return loss_sum.detach()  # type: ignore[no-any-return]


class StoredEngine(_TorchEngine):
    """One process, or DDP, with gradients and weights stored otherwise than as f32 on the device.

    Gradients are reduced as backward completes them, so PyTorch's wrapper, which would keep buckets of all of
    them, is not used.
    """

    def __init__(self, decoder: Decoder, optimizer: StoredAdamW, runtime: Runtime, grad_clip: float) -> None:
        super().__init__(decoder, optimizer, runtime, grad_clip)
        self.evaluated, self._stored = decoder, optimizer
        self._weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        self._gradients = Gradients(self._weights, runtime, optimizer)
        optimizer.gradient_of = self._gradients.of
        self.evidence = {**assert_spread(decoder, runtime), "optimizer": type(optimizer).__name__}

    def accumulate(
        self,
        inputs: Tensor,
        targets: Tensor,
        document_ids: Boundaries | None = None,
        *,
        scale: float | Tensor,
        last: bool,
    ) -> Tensor:
        """See `Engine.accumulate`."""
        self._network.train()
        self._gradients.begin(last=last)
        with self._runtime.accelerator.autocast():
            loss_sum, _ = self._network(inputs, targets, document_ids=document_ids)
        self.clock.enter(StepPart.BACKWARD)
        (loss_sum * scale).backward()
        return loss_sum.detach()  # type: ignore[no-any-return]

    def step(self, hold: Tensor, norm_limit: float = math.inf) -> Tensor:
        """See `Engine.step`."""
        norm = norm_of(self._gradients.squares(self._weights), self._runtime)
        share = clip_share(norm, self._grad_clip)
        self._stored.share = share if share.device.type != "cpu" or share < 1 else None
        self._stored.found_inf = held_back(norm, hold, norm_limit).float()
        self._gradients.finish()
        self._stored.step()
        self._gradients.forget()
        return norm.to(hold.device)


class FsdpEngine(_TorchEngine):
    """FSDP2. Every micro-batch reduces its gradients, so they are never held whole."""

    def __init__(
        self, decoder: Decoder, optimizer: torch.optim.Optimizer, runtime: Runtime, grad_clip: float
    ) -> None:
        super().__init__(decoder, optimizer, runtime, grad_clip)
        self._fsdp = _as_fsdp(decoder)
        self.evaluated = decoder
        self.evidence = {**assert_spread(decoder, runtime), "optimizer": type(optimizer).__name__}

    def accumulate(
        self,
        inputs: Tensor,
        targets: Tensor,
        document_ids: Boundaries | None = None,
        *,
        scale: float | Tensor,
        last: bool,
    ) -> Tensor:
        """See `Engine.accumulate`."""
        self._network.train()
        self._fsdp.set_is_last_backward(last)
        with self._runtime.accelerator.autocast():
            loss_sum, _ = self._network(inputs, targets, document_ids=document_ids)
        if self._runtime.storage.weights is not WeightStorage.F32:
            keep_f32_gradients(self._network)
        self.clock.enter(StepPart.BACKWARD)
        (loss_sum * scale).backward()
        return loss_sum.detach()  # type: ignore[no-any-return]


def _as_fsdp(decoder: nn.Module) -> FSDPModule:
    if (managed := as_fsdp(decoder)) is None:
        raise DistributedError(
            f"the network is a {type(decoder).__name__}, which FSDP2 does not manage",
            expected="a module that fully_shard was applied to",
            remedy="check that the installed PyTorch is a supported version",
            falsifier=NOT_AS_ASKED,
        )
    return managed


class ZeroEngine(Engine):
    """DeepSpeed, which clips and updates in one call; ``zero_veto`` says how a check comes in between."""

    def __init__(
        self,
        decoder: Decoder,
        optimizer: torch.optim.Optimizer,
        runtime: Runtime,
        *,
        micro_batch: int,
        grad_clip: float,
    ) -> None:
        import deepspeed  # noqa: PLC0415  (takes seconds, and only ZeRO needs it)

        stage = runtime.strategy.zero_stage
        if runtime.strategy is Strategy.ZERO3:
            # A block's weights come and go together, around its call: checkpointing and compiled code
            # inside it then see whole weights and no hook.
            deepspeed.utils.set_z3_leaf_modules(decoder, [DecoderBlock])
        self._runtime, self.clock = runtime, StepClock(runtime.device)
        deepspeed.init_distributed(dist_backend="gloo" if runtime.device.type == "cpu" else "nccl")
        settings = zero_config(
            stage,
            runtime,
            micro_batch=micro_batch,
            grad_clip=grad_clip,
            kept_whole=vector_elements(decoder.config),
        )
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=decoder, optimizer=optimizer, config=settings
        )
        self._assert_active(stage, grad_clip)
        if runtime.strategy is Strategy.ZERO3:
            ask_for_input_gradients(decoder)
        self._veto = Veto(self.optimizer)
        # Under ZeRO-3 only the engine's forward knows that a head may be the embedding's weight.
        self.evaluated = self._engine if runtime.strategy is Strategy.ZERO3 else decoder
        self.evidence = {**assert_spread(decoder, runtime), "zero_stage": stage}
        self.evidence["optimizer_elements"] = self._optimizer_elements(runtime)
        self.evidence["optimizer"] = type(getattr(self.optimizer, "optimizer")).__name__  # noqa: B009

    def accumulate(
        self,
        inputs: Tensor,
        targets: Tensor,
        document_ids: Boundaries | None = None,
        *,
        scale: float | Tensor,
        last: bool,
    ) -> Tensor:
        """See `Engine.accumulate`."""
        self._engine.train()
        self._engine.set_gradient_accumulation_boundary(last)
        loss_sum, _ = self._engine(inputs, targets, document_ids=document_ids)
        self.clock.enter(StepPart.BACKWARD)
        self._engine.backward(loss_sum * scale)
        return loss_sum.detach()  # type: ignore[no-any-return]

    def step(self, hold: Tensor, norm_limit: float = math.inf) -> Tensor:
        """See `Engine.step`."""
        norm = self._veto.step(self._engine.step, hold=bool(hold), limit=norm_limit)
        return torch.tensor(norm, dtype=torch.float64, device=self._runtime.device)

    def _optimizer_elements(self, runtime: Runtime) -> list[int]:
        """Elements of the f32 masters that each rank updates."""
        held = torch.zeros(runtime.world_size, dtype=torch.int64, device=runtime.device)
        held[runtime.rank] = sum(part.numel() for part in flat_parts(self.optimizer, runtime))
        counts: list[int] = runtime.sum(held).tolist()
        return counts

    def _assert_active(self, stage: int, grad_clip: float) -> None:
        found = (self._engine.zero_optimization_stage(), self._engine.gradient_clipping())
        if found != (stage, grad_clip):
            raise DistributedError(
                f"DeepSpeed runs with stage and clipping {found}",
                expected=f"{(stage, grad_clip)}",
                remedy="check that the installed DeepSpeed is a supported version",
                falsifier=NOT_AS_ASKED,
            )


def prepare(
    decoder: Decoder,
    optimizer: torch.optim.Optimizer,
    runtime: Runtime,
    *,
    micro_batch: int,
    grad_clip: float,
) -> Engine:
    """The engine of the run's strategy, proven to be active; a collective.

    Args:
        decoder: as ``sharding.build_decoder`` made it.
        optimizer: over its parameters, without state.
        runtime: this rank's view of the run.
        micro_batch: sequences per forward.
        grad_clip: largest global gradient norm that is applied.

    Raises:
        DistributedError: another strategy is active than the one asked for.
    """
    if runtime.strategy.zero_stage:
        return ZeroEngine(decoder, optimizer, runtime, micro_batch=micro_batch, grad_clip=grad_clip)
    if isinstance(optimizer, StoredAdamW) and runtime.storage.is_own(runtime.strategy):
        return StoredEngine(decoder, optimizer, runtime, grad_clip)
    if runtime.strategy.is_fsdp:
        return FsdpEngine(decoder, optimizer, runtime, grad_clip)
    return ReplicaEngine(decoder, optimizer, runtime, grad_clip)
