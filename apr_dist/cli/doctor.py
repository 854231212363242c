"""The verb that looks at this machine: what is installed, what would run, and what to fix."""

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

from apr_dist.cores import has_bf16_arithmetic, usable_cores
from apr_dist.errors import ExitCode

REQUIRED = ("torch", "accelerate", "deepspeed", "safetensors", "tokenizers", "numpy", "pydantic")
OPTIONAL = {
    "bitsandbytes": "bitsandbytes",
    "gguf": "gguf",
    "liger-kernel": "liger",
    "matplotlib": "report",
    "pyarrow": "parquet",
    "tensorboard": "track",
}
"""Package to the extra that brings it."""

FEW_OPEN_FILES = 4096
"""Below this, a data set of many shards on many ranks runs out of descriptors."""

SMALL_SHARED_MEMORY = 1 << 30
"""Below this, NCCL's shared-memory transport fails between GPUs of one machine."""

SMALL_FILES = 1 << 40
"""A limit of the size of a file below this can end a save in its middle."""

_DISK_BYTES = 64 << 20
_COLLECTIVE_TIMEOUT_S = 120

_OTHERS = "fsdp2, shard-grad-op, hsdp, zero1, zero2 or zero3"
_CPU_HINT = "set ACCELERATE_USE_CPU=true"

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
    yield from strategies()
    yield compiler(os.environ.get("CXX", "c++"))
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield file_size(resource.getrlimit(resource.RLIMIT_FSIZE)[0])
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
    bf16 = "bf16" if has_bf16_arithmetic() else "no bf16"
    kind = f"{torch.backends.cpu.get_cpu_capability()}, {bf16}"
    yield Finding("CPU", f"{usable_cores()} core(s) for this process, {kind}")
    for index in range(count):
        facts = torch.cuda.get_device_properties(index)
        yield Finding(f"GPU {index}", f"{facts.name}, {facts.total_memory / 2**30:,.1f} GiB")
    if not count:
        driver = shutil.which("nvidia-smi")
        fix = (
            "nvidia-smi is there and PyTorch sees no GPU: install a CUDA build of PyTorch" if driver else None
        )
        yield Finding("GPU", "none", fix)


def strategies() -> Iterator[Finding]:
    """What each way of starting would run here while ``parallel.strategy`` is auto, in this environment."""
    import torch  # noqa: PLC0415

    from apr_dist.choices import Strategy  # noqa: PLC0415

    device, gpus = ("cuda", torch.cuda.device_count()) if torch.cuda.is_available() else ("cpu", 0)
    yield Finding("run: python", f"{Strategy.SINGLE} on {device}")
    backend = "nccl" if gpus else "gloo"
    fix = None if gpus else _CPU_HINT
    several = f"{Strategy.DDP} over {backend}, unless --parallel.strategy names {_OTHERS}"
    yield Finding("run: torchrun", several if fix is None else f"{several}; {fix}")
    yield from _accelerate_launch()


def _accelerate_launch() -> Iterator[Finding]:
    from accelerate.commands.config.config_args import (  # noqa: PLC0415
        default_config_file,
        load_config_from_file,
    )

    if not Path(default_config_file).is_file():
        yield Finding("run: accelerate", "no configuration of its own; launch/*.yaml are ready ones")
        return
    try:
        found = load_config_from_file(None)
    except Exception as error:  # whatever a file that others wrote makes the library raise
        fix = f"run accelerate config again, or pass --config_file launch/... ({error})"
        yield Finding("run: accelerate", f"{default_config_file} cannot be read", fix)
        return
    kind = getattr(found.distributed_type, "value", found.distributed_type)
    text = f"{kind} over {found.num_processes} process(es), from {default_config_file}"
    yield Finding("run: accelerate", text)


def compiler(name: str) -> Finding:
    """Whether DeepSpeed could build what ZeRO needs on CPU ranks."""
    path = shutil.which(name)
    missing = f"{name} is not there: ZeRO on CPU ranks cannot be built (FSDP2 needs none)"
    return Finding("C++ compiler", path or missing)


def file_size(limit: int) -> Finding:
    """Whether a checkpoint may be as large as it is."""
    limited = 0 <= limit < SMALL_FILES
    shown = f"at most {limit / 1e9:,.1f} GB a file" if limited else "files of any size"
    return Finding("file size", shown, "ulimit -f unlimited" if limited else None)


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
    """Free space, and the speed of writing a file to the device and reading it back from there."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            block = os.urandom(1 << 20)
            began = time.perf_counter()
            for _ in range(_DISK_BYTES >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            wrote = _DISK_BYTES / (time.perf_counter() - began)
            # Pages that the kernel still holds would be read from memory.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            file.seek(0)
            while file.read(1 << 20):
                pass
            read = _DISK_BYTES / (time.perf_counter() - began)
    except OSError as error:
        fix = "name a folder that can be written: apr-dist doctor FOLDER"
        return Finding("disk", f"{folder.resolve()}: cannot be written ({error.strerror})", fix, True)
    free = shutil.disk_usage(folder).free
    room = "free some space: a checkpoint of 1 B parameters takes 12 GB with its state"
    speed = f"writes {wrote / 1e6:,.0f} MB/s, reads {read / 1e6:,.0f} MB/s"
    text = f"{folder.resolve()}: {free / 1e9:,.1f} GB free, {speed}"
    return Finding("disk", text, room if free < 12e9 else None)


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
