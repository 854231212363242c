"""The verb that looks at this machine: what is installed, what would run, and what to mend."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import psutil
import tyro

from apr_dist.errors import ExitCode

REQUIRED = ("torch", "accelerate", "deepspeed", "safetensors", "tokenizers", "numpy", "pydantic")
OPTIONAL = {"gguf": "gguf", "matplotlib": "report", "jinja2": "report"}

FEW_OPEN_FILES = 4096
"""Below this, a data set of many shards on many ranks runs out of descriptors."""

SMALL_SHARED_MEMORY = 1 << 30
"""Below this, NCCL's shared-memory transport fails between GPUs of one machine."""

_DISK_BYTES = 64 << 20
_COLLECTIVE_TIMEOUT_S = 120

_COLLECTIVE = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2,
                        timeout=timedelta(seconds=60))
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
dist.destroy_process_group()
sys.exit(0 if total.item() == 3.0 else 1)
"""
"""One rank of two: the sum of 1 and 2 must arrive at both."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``fix`` says what to do where something is wrong."""

    what: str
    found: str
    fix: str | None = None
    fatal: bool = False


def doctor(
    folder: Annotated[Path, tyro.conf.Positional] = Path(), /, *, skip_collective: bool = False
) -> int:
    """Look at this machine: versions, devices, limits, disk, a 2-process collective; ends with what to fix.

    Example: apr-dist doctor /data

    Args:
        folder: where runs or shards will lie; its disk is measured.
        skip_collective: leave out the collective between two processes, which takes seconds.
    """
    findings = []
    for finding in _examine(folder, skip_collective=skip_collective):
        mark = "ok " if finding.fix is None else "BAD" if finding.fatal else "!  "
        print(f"{mark} {finding.what:<16} {finding.found}", flush=True)
        findings.append(finding)
    fixes = [finding for finding in findings if finding.fix is not None]
    print(f"\nto fix: {'nothing' if not fixes else ''}".rstrip())
    for finding in fixes:
        print(f"  {finding.what}: {finding.fix}")
    return int(ExitCode.USAGE if any(finding.fatal for finding in fixes) else ExitCode.OK)


def _examine(folder: Path, *, skip_collective: bool) -> Iterator[Finding]:
    yield Finding("python", f"{sys.version.split()[0]} on {sys.platform}")
    yield from packages()
    yield _extension()
    yield from _devices()
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield from _shared_memory(Path("/dev/shm"))  # noqa: S108  (measured, not written to)
    memory = psutil.virtual_memory()
    yield Finding("memory", f"{memory.total / 1e9:,.1f} GB, {memory.available / 1e9:,.1f} GB available")
    yield disk(folder)
    if not skip_collective:
        yield collective()


def packages() -> Iterator[Finding]:
    """Every package a run needs, and those of the extras, with their versions."""
    for name in REQUIRED:
        found = _version(name)
        missing = f"pip install {name}" if found is None else None
        yield Finding(name, found or "not installed", missing, fatal=missing is not None)
    for name, extra in OPTIONAL.items():
        yield Finding(name, _version(name) or f"not installed (extra {extra}, optional)")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _extension() -> Finding:
    try:
        from apr_dist import _rust_loader  # noqa: PLC0415
    except ImportError as error:
        fix = "build it with make setup, or install the wheel"
        return Finding("Rust loader", f"cannot be imported ({error})", fix, fatal=True)
    return Finding("Rust loader", Path(_rust_loader.__file__ or "").name)


def _devices() -> Iterator[Finding]:
    import torch  # noqa: PLC0415  (takes seconds, after the quick findings are printed)

    count = torch.cuda.device_count()
    cores = len(psutil.Process().cpu_affinity() or []) or os.cpu_count()
    yield Finding("CPU", f"{cores} core(s) for this process, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(count):
        facts = torch.cuda.get_device_properties(index)
        yield Finding(f"GPU {index}", f"{facts.name}, {facts.total_memory / 2**30:,.1f} GiB")
    if not count:
        driver = shutil.which("nvidia-smi")
        fix = (
            "nvidia-smi is there and PyTorch sees no GPU: install a CUDA build of PyTorch" if driver else None
        )
        yield Finding("GPU", "none", fix)
    alone = "one process: single; several: ddp, or what parallel.strategy names"
    yield Finding("strategy", f"{'cuda' if count else 'cpu'}; {alone}")


def open_files(limit: int) -> Finding:
    """Whether the limit of open files leaves room for many shards."""
    fix = f"ulimit -n {FEW_OPEN_FILES * 16}" if 0 <= limit < FEW_OPEN_FILES else None
    return Finding("open files", f"at most {limit:,}", fix)


def _shared_memory(mount: Path) -> Iterator[Finding]:
    if mount.is_dir():
        size = shutil.disk_usage(mount).total
        fix = "start the container with --shm-size=8g or --ipc=host" if size < SMALL_SHARED_MEMORY else None
        yield Finding("shared memory", f"{size / 2**30:,.1f} GiB", fix)


def disk(folder: Path) -> Finding:
    """Free space, and the speed of writing a file that is synchronised to the device."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            block = os.urandom(1 << 20)
            began = time.perf_counter()
            for _ in range(_DISK_BYTES >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            wrote = _DISK_BYTES / (time.perf_counter() - began)
    except OSError as error:
        return Finding(
            "disk", f"{folder}: cannot be written ({error.strerror})", "choose another folder", True
        )
    free = shutil.disk_usage(folder).free
    fix = (
        "free some space: a checkpoint of 1 B parameters takes 12 GB with its state" if free < 12e9 else None
    )
    return Finding("disk", f"{folder}: {free / 1e9:,.1f} GB free, writes {wrote / 1e6:,.0f} MB/s", fix)


def collective() -> Finding:
    """Whether two processes of this machine can add up a tensor."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _COLLECTIVE]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                [*command, str(rank), f"{folder}/meet"],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            errors = [rank.communicate(timeout=_COLLECTIVE_TIMEOUT_S)[1] for rank in ranks]
        except subprocess.TimeoutExpired:
            errors = [f"no answer in {_COLLECTIVE_TIMEOUT_S} s"]
        finally:
            for rank in ranks:
                rank.kill()
    if all(rank.returncode == 0 for rank in ranks):
        return Finding("collective", "two processes agree (gloo)")
    last = " ".join(errors).strip().splitlines()[-1:] or ["no message"]
    fix = "check that the host's name resolves, or set GLOO_SOCKET_IFNAME=lo"
    return Finding("collective", f"failed: {last[0]}", fix, fatal=True)
