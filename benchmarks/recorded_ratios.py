"""The ratios ``bench_quick`` recorded: read and checked before anything is measured, written, compared with.

A ratio belongs to the processor, the threads and the PyTorch it was measured with; beside those of another
machine it is shown and not judged.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

Ratios = dict[str, list[float]]
"""Ratios by name, one for each pair that was measured."""

AS_BEFORE, WORSE, UNUSABLE = 0, 1, 2
"""Exit codes: nothing is worse (or nothing was judged), something is, there is nothing to compare with."""

STALLED = 2.0
"""Times the median above which a pair is not of what it measures."""

RANGE = ("median", "min", "max")


@dataclass(frozen=True)
class Machine:
    """What a ratio was measured on."""

    processor: str
    threads: int
    torch: str

    @staticmethod
    def this() -> Machine:
        """The one that runs now."""
        return Machine(_processor(), torch.get_num_threads(), torch.__version__)

    def __str__(self) -> str:
        return f"{self.processor}, {self.threads} threads, torch {self.torch}"


@dataclass(frozen=True)
class Recorded:
    """Median, smallest and largest ratio by name, and what they were measured on."""

    machine: Machine
    ratios: dict[str, dict[str, float]]


class NotUsable(Exception):
    """The record cannot be compared with; the message says why in one sentence."""


def guard(measure: Callable[[], Ratios], path: Path, *, record: bool) -> int:
    """Measure, and record or compare; the exit code.

    Args:
        measure: gives the ratios; not called when there is nothing to compare with.
        path: the record.
        record: write what was measured there instead of comparing.
    """
    try:
        if record:
            write(measure(), path)
            return AS_BEFORE
        recorded = read(path)
    except NotUsable as error:
        print(error, file=sys.stderr)
        return UNUSABLE
    return compare(measure(), recorded, Machine.this())


def read(path: Path) -> Recorded:
    """The record.

    Raises:
        NotUsable: it is not there, not JSON, or not of the shape that `write` gives it.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotUsable(f"{path} is not there: run with --record on a quiet machine first") from None
    except (OSError, ValueError) as error:
        raise NotUsable(f"{path} cannot be read as JSON ({error}): record it again with --record") from None
    try:
        return _checked(facts)
    except NotUsable as error:
        raise NotUsable(f"{path}: {error}: record it again with --record") from None


def write(found: Ratios, path: Path) -> None:
    """Write what was measured, and on what.

    Raises:
        NotUsable: something stalled, so that nothing would ever be worse than the record; it stays as it was.
    """
    ratios = {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in found.items()
    }
    stalled = [name for name, row in ratios.items() if row["max"] > STALLED * row["median"]]
    if stalled:
        raise NotUsable(
            f"{', '.join(stalled)} stalled meanwhile: record on a quiet machine; nothing is written"
        )
    facts = {"measured_on": asdict(Machine.this()), "ratios": ratios}
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(f"recorded {len(ratios)} ratios in {path.name}")


def compare(found: Ratios, recorded: Recorded, here: Machine) -> int:
    """Say what moved; the exit code.

    On the recorded machine something is worse when it is slower or larger than it ever was while recording,
    and a little. A recorded ratio that nobody measures any more is a failure on any machine.
    """
    judged = here == recorded.machine
    worse = []
    print(f"{'ratio to the plain way':28}{'now':>8}{'recorded (range)':>26}  ")
    for name, values in found.items():
        now, before = statistics.median(values), recorded.ratios.get(name)
        if before is None:
            print(f"{name:28}{now:8.3f}{'-':>26}  new: record it")
            continue
        verdict = _verdict(name, now, before) if judged else "not judged"
        if verdict == "WORSE":
            worse.append(name)
        known = f"{before['median']:.3f} ({before['min']:.3f}-{before['max']:.3f})"
        print(f"{name:28}{now:8.3f}{known:>26}  {verdict}")
    gone = [name for name in recorded.ratios if name not in found]
    if not judged:
        print(f"not judged: recorded on {recorded.machine}; this is {here}")
    if worse:
        print(f"regression: {', '.join(worse)}", file=sys.stderr)
    if gone:
        print(f"recorded and no longer measured: {', '.join(gone)}", file=sys.stderr)
    return WORSE if worse or gone else AS_BEFORE


def _verdict(name: str, now: float, before: dict[str, float]) -> str:
    slack = 1.01 if name.startswith("bytes") else 1.05  # a few pairs do not show the whole range
    if now > before["max"] * slack:
        return "WORSE"
    return "better: record it" if now < before["min"] / slack else "as before"


def _checked(facts: Any) -> Recorded:
    if not isinstance(facts, dict) or facts.keys() != {"measured_on", "ratios"}:
        raise NotUsable("it is not an object of measured_on and ratios")
    machine, ratios = facts["measured_on"], facts["ratios"]
    kinds = {"processor": str, "threads": int, "torch": str}
    if not isinstance(machine, dict) or {name: type(value) for name, value in machine.items()} != kinds:
        raise NotUsable("measured_on does not name processor, threads and torch")
    if not isinstance(ratios, dict) or not ratios:
        raise NotUsable("there is no ratio in it")
    for name, row in ratios.items():
        if not isinstance(row, dict) or row.keys() != set(RANGE):
            raise NotUsable(f"the ratio {name!r} has not exactly {', '.join(RANGE)}")
        if not all(type(value) in (int, float) and math.isfinite(value) for value in row.values()):
            raise NotUsable(f"the ratio {name!r} has something that is not a number")
        if not 0 < row["min"] <= row["median"] <= row["max"]:
            raise NotUsable(f"the ratio {name!r} has a median outside its range, or is not positive")
    return Recorded(Machine(**machine), ratios)


def _processor() -> str:
    """The processor's name; Linux tells it in a file of its own only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names[0] if names else platform.processor()) or f"{platform.machine()}, {os.cpu_count()} cores"
