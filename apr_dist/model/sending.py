"""Small values on their way from the host to a device that must not be waited for."""

from __future__ import annotations

from torch import Tensor
from torch import device as Device  # noqa: N812


def send(values: Tensor, device: Device) -> Tensor:
    """Host values on ``device``; work asked for from now on sees them, and the host waits for nothing.

    A copy to CUDA from ordinary memory is one that the host waits for, with all that was asked for before
    it; hence the copy from page-locked memory, which PyTorch keeps for the next.
    """
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
