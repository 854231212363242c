"""What processors this process has: how many it may really use, by affinity and quota, and what they can.

A container with two processors' worth of time on a machine of 64 sees 64 of them; 64 threads would then take
turns in being stopped.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_GROUPS = Path("/sys/fs/cgroup")
_MINE = Path("/proc/self/cgroup")
_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}


def usable_cores() -> int:
    """Processors this process may use, at least 1; a quota of one and a half counts as two."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in quotas(_GROUPS, _MINE))]))


def quotas(groups: Path, mine: Path) -> Iterator[float]:
    """Limits of processor time, in processors, of this process's control groups and of those above them.

    Args:
        groups: where the control groups are mounted.
        mine: the file that names this process's own, ``hierarchy:controllers:path`` a line.
    """
    for line in _read(mine).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            for folder in _upwards(groups, path):
                yield from _quota(_read(folder / "cpu.max").split())
        elif "cpu" in controllers.split(","):
            for folder in _upwards(groups / "cpu", path):
                parts = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
                yield from _quota(parts)


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """The folder of a group and of all above it; inside a container only the root may be there."""
    inside = PurePosixPath(path.lstrip("/"))
    for parent in (inside, *inside.parents):
        yield root / parent


def _quota(parts: list[str]) -> Iterator[float]:
    """Time and period in microseconds; ``max``, or -1 in the older form, is no limit."""
    if len(parts) == 2 and all(part.isdecimal() for part in parts) and int(parts[1]):
        yield int(parts[0]) / int(parts[1])


def has_bf16_arithmetic() -> bool:
    """Whether the processor multiplies bf16, by AVX-512, AMX or on Arm; True where nothing tells."""
    about = _read(Path("/proc/cpuinfo")).splitlines()
    lines = [line for line in about if line.startswith(("flags", "Features"))]
    return not lines or not _BF16.isdisjoint(lines[0].split())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
