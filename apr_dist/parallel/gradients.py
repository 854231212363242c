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

from apr_dist.model.host_copies import HostCopies, host_empty
from apr_dist.parallel.norm import squares_of
from apr_dist.parallel.rounding import key_of, round_stochastically
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.split_weights import CHUNK, chunk
from apr_dist.parallel.storage import EMBEDDING, has_bf16_gradient
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
        storage, strategy = runtime.storage, runtime.strategy
        self._copies = HostCopies(runtime.device) if storage.streams(strategy) else None
        self._kind: dict[int, torch.dtype] = {}
        self._kept: dict[int, Tensor] = {}
        self._room: dict[int, Tensor] = {}
        self._squares: dict[int, Tensor] = {}
        self._last, self._micro_batch = False, 0
        for weight in weights:
            narrow = has_bf16_gradient(weight.shape, strategy, storage.gradients)
            self._kind[id(weight)] = torch.bfloat16 if narrow else torch.float32
            if weight.dtype is torch.bfloat16:
                looked_up = optimizer.places[id(weight)].name == EMBEDDING
                weight.grad_dtype = torch.float32 if looked_up else self._kind[id(weight)]
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
        key, new = id(weight), new.detach()
        earlier = self._earlier(key)
        if self._last and self._runtime.world_size > 1:
            whole = new.float() if earlier is None else earlier.float().add_(new)
            new, earlier = self._runtime.sum(whole.div_(self._runtime.world_size)), None
        total = self._summed(new, earlier, key)
        del new, earlier
        if self._last:
            self._squares[key] = squares_of(total)
        self._keep(total, key)

    def _earlier(self, key: int) -> Tensor | None:
        """The sum of the micro-batches before this one, on the device."""
        earlier = self._kept.get(key)
        if earlier is None or self._copies is None:
            return earlier
        self._copies.begin()
        (here,) = self._copies.bring([earlier])
        self._copies.arrived()
        return here.view(earlier.shape)

    def _summed(self, new: Tensor, earlier: Tensor | None, key: int) -> Tensor:
        """The sum as it is stored, in the memory of the earlier one; it is rounded a chunk at a time."""
        if self._kind[key] is torch.float32:
            return new.float() if earlier is None else earlier.add_(new)
        if earlier is None and new.dtype is torch.bfloat16:
            return new
        total = earlier
        if total is None:
            total = torch.empty(new.shape, dtype=torch.bfloat16, device=new.device)
        optimizer = self._optimizer
        name = f"{optimizer.places[key].name} gradient {self._micro_batch}"
        rounding = key_of(optimizer.seed, optimizer.updates, name)
        stored, more = total.view(-1), new.reshape(-1)
        for number in range(-(-len(more) // CHUNK)):
            part, exact = stored[chunk(number)], more[chunk(number)].float()
            if earlier is not None:
                exact = part.float().add_(exact)
            part.copy_(round_stochastically(exact, key=rounding, start=number * CHUNK))
        return total

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
