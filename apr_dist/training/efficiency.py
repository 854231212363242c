"""What a run makes of its machine: model FLOPs utilisation, busy share of the GPU, peak memory."""

from __future__ import annotations

import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from apr_dist.choices import Precision
from apr_dist.model.adapters import Adapter
from apr_dist.model.config import TransformerConfig
from apr_dist.model.flops import ADAPTED, FORMULA, flops_per_token, peak_flops
from apr_dist.parallel.heartbeat import HERE, Phase
from apr_dist.parallel.runtime import Runtime

STATUS = Path("/proc/self/stat")


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Arithmetic of a token, and what the devices could do at most.

    Attributes:
        flops_per_token: operations of forward and backward.
        peak_flops: of one device in FLOP/s; None when it is not in the table.
        devices: how many there are.
        device_name: as its maker calls it.
        precision: type of the products.
        isolated: whether attention stays inside documents, of which the formula knows nothing.
        formula: of the operations, in words.
    """

    flops_per_token: int
    peak_flops: float | None
    devices: int
    device_name: str
    precision: Precision
    isolated: bool = False
    formula: str = FORMULA

    def mfu(self, tokens_per_sec: float) -> float | None:
        """Model FLOPs utilisation at this speed of the whole run, between 0 and 1; None: unknown peak."""
        if self.peak_flops is None:
            return None
        return self.flops_per_token * tokens_per_sec / (self.devices * self.peak_flops)

    def describe(self) -> str:
        """The formula with its numbers, in one line."""
        work = f"{self.flops_per_token / 1e9:,.3g} GFLOP per token ({self.formula})"
        if self.isolated:
            work += ", of whole sequences: less is computed where documents are isolated"
        if self.peak_flops is None:
            return f"{work}; MFU n/a: the peak of {self.device_name} is not known"
        peak = f"{self.devices} x {self.peak_flops / 1e12:g} TFLOP/s ({self.device_name}, {self.precision})"
        return f"MFU = {work} x tokens/s / {peak}"


def efficiency_of(
    model: TransformerConfig,
    runtime: Runtime,
    *,
    seq_length: int,
    precision: Precision,
    isolated: bool,
    adapter: Adapter | None = None,
) -> Efficiency:
    """What a token costs on this rank's kind of device.

    Args:
        model: architecture.
        runtime: this rank's view of the processes.
        seq_length: tokens a sequence is trained on.
        precision: of the products.
        isolated: whether documents of a sequence do not see each other.
        adapter: what is trained in place of the weights.
    """
    cuda = runtime.device.type == "cuda"
    name = torch.cuda.get_device_name(runtime.device) if cuda else "this processor"
    dtype = torch.bfloat16 if precision is Precision.BF16 else torch.float32
    return Efficiency(
        flops_per_token=flops_per_token(model, seq_length, adapter=adapter),
        formula=FORMULA if adapter is None else ADAPTED,
        peak_flops=peak_flops(name, dtype) if cuda else None,
        devices=runtime.world_size,
        device_name=name,
        precision=precision,
        isolated=isolated,
    )


def gpu_utilisation(device: torch.device) -> float:
    """Utilisation in percent of a CUDA device over the driver's last sample period.

    0 on CPU, and where the driver does not tell, as of a part of a device (MIG).
    """
    if device.type != "cuda":
        return 0.0
    try:
        return float(torch.cuda.utilization(device))
    except Exception:  # whatever the driver's library raises: a figure must not end a run
        return 0.0


def host_peak_bytes() -> int:
    """Most memory this process has held so far (``ru_maxrss``, which macOS counts in bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: by tensors on a CUDA device, by the process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else host_peak_bytes()


def device_name(device: torch.device) -> str:
    """What the arithmetic runs on: ``cpu``, or the name of the CUDA device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def process_age_s() -> float:
    """Seconds since this process began.

    On Linux to a hundredth. psutil adds the time of boot, which the kernel tells in whole seconds.
    """
    try:
        status = STATUS.read_text(encoding="utf-8", errors="replace")
        ticks = int(status.rpartition(")")[2].split()[19])  # field 22, starttime: see proc_pid_stat(5)
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.time() - psutil.Process().create_time()


def launch_text() -> str:
    """How long it took from the beginning of this process to the end of its first step, by phase."""
    HERE.enter(HERE.phase)  # counts the phase we are in up to now
    total = process_age_s()
    parts = {phase.value: seconds for phase, seconds in HERE.spent.items() if phase is not Phase.STARTING}
    shown = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    before = total - sum(parts.values())
    return f"first step done {total:.1f} s after the process began: before the gates {before:.1f}, {shown}"
