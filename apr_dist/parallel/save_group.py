"""What ranks tell one another while they save, apart from the collectives of training.

Messages go over a gloo group of their own, from host memory to host memory, so that a thread can save
while the main thread trains. Everything a rank tells travels as JSON or as tensors; nothing is pickled.
"""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from apr_dist.errors import AprDistError
from apr_dist.parallel.heartbeat import HERE
from apr_dist.parallel.runtime import Runtime


class Exchange:
    """One rank's end of the group; making it is a collective.

    Args:
        runtime: this rank's view of the run.

    Attributes:
        moved_at: monotonic time of the last sign of progress of what uses it, in seconds.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.rank, self.world_size = runtime.rank, runtime.world_size
        self._group = dist.new_group(backend="gloo") if runtime.world_size > 1 else None
        self.moved()

    def moved(self) -> None:
        """Say that a run of elements was given, taken or written."""
        self.moved_at = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            HERE.moved_at = self.moved_at

    def collect(self, value: Any) -> list[Any]:
        """Every rank's JSON value, by rank; a collective."""
        if self._group is None:
            return [value]
        payload = bytearray(json.dumps(value).encode())
        sizes = torch.zeros(self.world_size, dtype=torch.int64)
        sizes[self.rank] = len(payload)
        dist.all_reduce(sizes, group=self._group)
        longest = int(sizes.max())
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(payload)] = torch.frombuffer(payload, dtype=torch.uint8)
        all_of_them = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(all_of_them, mine, group=self._group)
        return [
            json.loads(bytes(one[:size].numpy()))
            for one, size in zip(all_of_them, sizes.tolist(), strict=True)
        ]

    def agree(self, error: AprDistError | None) -> None:
        """Let every rank know of every rank's error; a collective.

        Raises:
            AprDistError: on all ranks: this rank's own, or the lowest other rank's.
        """
        found = self.collect(None if error is None else error.to_fields())
        if error is not None:
            raise error
        for fields in found:
            if fields is not None:
                raise AprDistError.from_fields(fields)

    def send(self, values: Tensor) -> None:
        """Give rank 0 a flat tensor, which it receives."""
        dist.send(values.contiguous(), dst=0, group=self._group)
        self.moved()

    def receive(self, values: Tensor, source: int) -> None:
        """Take into ``values`` on rank 0 what rank ``source`` sends."""
        dist.recv(values, src=source, group=self._group)
