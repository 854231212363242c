"""Gradients of one process or of DDP between backward and update: added up, reduced, kept.

Each parameter's gradient is taken as backward completes it. The first of a step is kept as it is; a later one
is added in f32. At the last micro-batch it is averaged over the ranks in f32 and its part of the global norm
is measured. What is kept is f32, or bf16: a sum that bf16 does not hold is rounded stochastically, so that a
term that is small beside the sum is not lost on average, however many there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apr_dist.choices import GradientStorage
from apr_dist.model.host_copies import HostCopies, host_empty
from apr_dist.parallel.norm import squares_of
from apr_dist.parallel.rounding import key_of, round_stochastically
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.storage import is_narrow
from apr_dist.parallel.stored_adamw import StoredAdamW


class Gradients:
    """The gradients of all trained parameters.

    Args:
        weights: the parameters.
        runtime: this rank's view of the run.
        optimizer: their optimizer, which knows their names and counts steps.
    """

    def __init__(self, weights: Sequence[Tensor], runtime: Runtime, optimizer: StoredAdamW) -> None:
        self._runtime, self._optimizer = runtime, optimizer
        bf16, strategy = runtime.storage.gradients is GradientStorage.BF16, runtime.strategy
        self._copies = HostCopies(runtime.device) if runtime.storage.streams(strategy) else None
        self._kind: dict[int, torch.dtype] = {}
        self._kept: dict[int, Tensor] = {}
        self._room: dict[int, Tensor] = {}
        self._squares: dict[int, Tensor] = {}
        self._last, self._micro_batch = False, 0
        for weight in weights:
            narrow = bf16 and is_narrow(optimizer.places[id(weight)].name, weight.shape, strategy)
            self._kind[id(weight)] = torch.bfloat16 if narrow else torch.float32
            if weight.dtype is torch.bfloat16:
                weight.grad_dtype = self._kind[id(weight)]
            weight.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]

    def begin(self, *, last: bool) -> None:
        """Before each backward: whether it is the step's last."""
        self._last = last
        self._micro_batch += 1

    def of(self, weight: Tensor) -> Tensor | None:
        """The complete gradient of a parameter, where it is kept."""
        return self._kept.get(id(weight))

    def squares(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The parts of the squared global norm, in the order of these parameters."""
        return [self._squares[id(one)] for one in weights if id(one) in self._squares]

    def forget(self) -> None:
        """Let go of all gradients; host memory is kept for the next ones."""
        self._kept.clear()
        self._squares.clear()
        self._micro_batch = 0

    def finish(self) -> None:
        """Wait until what left the device is in host memory."""
        if self._copies is not None:
            self._copies.finish()

    def _take(self, weight: Tensor) -> None:
        new, weight.grad = weight.grad, None
        assert new is not None
        key = id(weight)
        total = self._with_earlier(new.detach(), key)
        if self._last and self._runtime.world_size > 1:
            total = self._runtime.sum(total.float().div_(self._runtime.world_size))
        total = self._stored(total, key)
        if self._last:
            self._squares[key] = squares_of(total)
        self._keep(total, key)

    def _with_earlier(self, new: Tensor, key: int) -> Tensor:
        earlier = self._kept.get(key)
        if earlier is None:
            return new
        if self._copies is not None:
            self._copies.begin()
            (earlier,) = self._copies.bring([earlier])
            self._copies.arrived()
            earlier = earlier.view(new.shape)
        return earlier.add_(new) if earlier.dtype is torch.float32 else earlier.float().add_(new)

    def _stored(self, total: Tensor, key: int) -> Tensor:
        if self._kind[key] is torch.float32 or total.dtype is torch.bfloat16:
            return total.to(self._kind[key])
        optimizer = self._optimizer
        name = f"{optimizer.places[key].name} gradient {self._micro_batch}"
        rounding = key_of(optimizer.seed, optimizer.updates, name)
        return round_stochastically(total.reshape(-1), key=rounding, start=0).view(total.shape)

    def _keep(self, total: Tensor, key: int) -> None:
        if self._copies is None:
            self._kept[key] = total
            return
        room = self._room.get(key)
        if room is None:
            room = host_empty(total.numel(), total.dtype, device=self._runtime.device).view(total.shape)
            self._room[key] = room
        self._copies.send([(room, total)])
        self._kept[key] = room
