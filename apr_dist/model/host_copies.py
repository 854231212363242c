"""Copies between a device and host memory that overlap with what the device computes.

On CUDA each direction has a stream of its own and host memory is page-locked. On the CPU the device is host
memory too, and the same copies are made one after another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

AHEAD = 2
"""Groups of tensors that may be on their way out before the host waits for the first."""


def host_empty(count: int, kind: torch.dtype, *, device: torch.device) -> Tensor:
    """Flat host memory; page-locked where a CUDA device reads and writes it."""
    return torch.empty(count, dtype=kind, device="cpu", pin_memory=_has_streams(device))


def _has_streams(device: torch.device) -> bool:
    """Whether it is a GPU that is there; one that is imagined, to trace a step, has none."""
    return device.type == "cuda" and torch.cuda.is_available()


class HostCopies:
    """Brings groups of host tensors to the device and sends them home, in order.

    Args:
        device: where they are used.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cuda = _has_streams(device)
        self._in: Any = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self._out: Any = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self._coming: deque[tuple[Any, list[Tensor]]] = deque()
        self._leaving: deque[Any] = deque()

    def begin(self) -> None:
        """Let what was sent before be home before any of it is brought again."""
        if self._in is not None:
            self._in.wait_stream(self._out)

    def bring(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies on the device, which may be used after the next `arrived` that is theirs."""
        with torch.cuda.stream(self._in):  # a no-op without a stream
            copies = [
                torch.empty_like(one, device=self._device).copy_(one, non_blocking=True) for one in tensors
            ]
            event = None if self._in is None else self._in.record_event()
        self._coming.append((event, copies))
        return copies

    def arrived(self) -> None:
        """Let the current stream wait for the oldest group that was brought."""
        event, copies = self._coming.popleft()
        if event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(event)
            for one in copies:
                one.record_stream(current)

    def send(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy tensors home: pairs of host memory and what the current stream has computed for it."""
        if self._out is None:
            for home, here in pairs:
                home.copy_(here)
            return
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            for home, here in pairs:
                home.copy_(here, non_blocking=True)
                here.record_stream(self._out)
            self._leaving.append(self._out.record_event())
        if len(self._leaving) > AHEAD:
            self._leaving.popleft().synchronize()

    def finish(self) -> None:
        """Wait until everything is home."""
        if self._out is not None:
            self._out.synchronize()
            self._leaving.clear()


@dataclass
class _Kept:
    """One tensor in host memory, the one that was kept before it, and its copy that is on its way back."""

    host: Tensor | None
    before: _Kept | None
    coming: Tensor | None = None


class HostInputs:
    """Keeps what a forward saves in host memory, and fetches each before its turn in the backward.

    A backward asks in the reverse order; while it uses one, the one before is on its way.
    """

    def __init__(self) -> None:
        self._copies: HostCopies | None = None
        self._newest: _Kept | None = None

    def pack(self, saved: Tensor) -> _Kept:
        """Begin to copy a tensor to host memory, in place of keeping it."""
        if self._copies is None:
            self._copies = HostCopies(saved.device)
        host = host_empty(saved.numel(), saved.dtype, device=saved.device).view(saved.shape)
        self._copies.send([(host, saved.detach())])
        self._newest = _Kept(host, self._newest)
        return self._newest

    def unpack(self, kept: _Kept) -> Tensor:
        """The tensor on its device again."""
        assert self._copies is not None
        self._fetch(kept)
        self._copies.arrived()
        here, before = kept.coming, kept.before
        kept.host = kept.coming = kept.before = None
        if before is not None:
            self._fetch(before)
        if self._newest is kept:
            self._newest = before
        assert here is not None
        return here

    def _fetch(self, kept: _Kept) -> None:
        assert self._copies is not None
        if kept.coming is None and kept.host is not None:
            self._copies.begin()
            (kept.coming,) = self._copies.bring([kept.host])
