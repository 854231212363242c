"""Batches made ahead of time by a Rust thread, into its own buffers or into pinned ones.

Lives here: what one run of consecutive batches needs. When to start or drop one is ``loader``'s to say.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from apr_dist._rust_loader import Prefetcher, TokenStream

_LARGE_BYTES = 4 << 20
_VIEWED = 64


class _Process:
    """Which process this is, without asking the system for every batch: 0, then 1 in its forked child."""

    number = 0

    def forked(self) -> None:
        self.number += 1


process = _Process()
os.register_at_fork(after_in_child=process.forked)


@dataclass(frozen=True)
class Course:
    """Which batches are made.

    Attributes:
        first: position of this rank's first sequence of the first batch.
        share: sequences of each batch.
        stride: positions from one batch to the next.
        batches: how many there are; None: no end.
        rows_per_view: hand out views of that many rows; None: gather.
        depth: batches kept ready.
        flagged: find where conversations begin in each.
    """

    first: int
    share: int
    stride: int
    batches: int | None
    rows_per_view: int | None
    depth: int
    flagged: bool = False


@dataclass(frozen=True)
class BufferKind:
    """What a gathered batch looks like: [share, width] of ``dtype``, in page-locked memory if ``pinned``."""

    width: int
    dtype: torch.dtype
    pinned: bool


def default_depth(share: int, width: int, *, views: bool) -> int:
    """Batches worth keeping ready: two, up to eight of small ones, and many where none takes memory."""
    return _VIEWED if views else max(2, min(8, _LARGE_BYTES // (share * width * 4)))


class RunAhead:
    """The batches of a course, in order; number ``k`` is the next one's, ``made`` the latest's, or -1.

    Pinned buffers come from PyTorch's caching host allocator, which knows when a copy to a device has
    really ended: a buffer is never filled again while a device still reads it.
    """

    def __init__(self, stream: TokenStream, course: Course, kind: BufferKind, *, k: int) -> None:
        self.k, self.made, self.process = k, -1, process.number
        self._shape, self._kind = (course.share, kind.width), kind
        self._views = course.rows_per_view is not None
        self._waiting: deque[torch.Tensor] | None = None
        buffers = None
        if kind.pinned and not self._views:
            self._waiting = deque(self._buffer() for _ in range(course.depth))
            buffers = [_capsule(buffer) for buffer in self._waiting]
        self._prefetcher = Prefetcher(
            stream,
            first=course.first,
            count=course.share,
            stride=course.stride,
            depth=course.depth,
            batches=course.batches,
            rows_per_view=course.rows_per_view,
            buffers=buffers,
            flagged=course.flagged,
        )
        self._next = self._prefetcher.next

    def next(self) -> list[torch.Tensor] | None:
        """The next batch: one gathered tensor or its views; None behind the last."""
        if self._waiting is not None:
            return self._next_pinned(self._waiting)
        made = self._next()
        if made is None:
            return None
        self.made, self.k = self.k, self.k + 1
        return [from_dlpack(view) for view in made] if self._views else [from_dlpack(made)]

    def _next_pinned(self, waiting: deque[torch.Tensor]) -> list[torch.Tensor] | None:
        fresh = self._buffer()
        if self._prefetcher.next(_capsule(fresh)) is None:
            return None
        waiting.append(fresh)
        self.made, self.k = self.k, self.k + 1
        return [waiting.popleft()]

    def edges(self) -> NDArray[np.int32]:
        """Where conversations begin in the inputs of batch ``made``, and its end; of a flagged course."""
        return np.frombuffer(bytearray(self._prefetcher.edges()), dtype=np.int32)

    def faults(self) -> tuple[int, int] | None:
        """Minor and major page faults of the thread so far."""
        return self._prefetcher.faults()

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._prefetcher.close()

    def _buffer(self) -> torch.Tensor:
        return host_buffer(self._shape, self._kind.dtype)


def host_buffer(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised page-locked memory."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def _capsule(tensor: torch.Tensor) -> Any:
    return tensor.__dlpack__(max_version=(1, 0))
