"""Whether a run that is told to stop has the time to finish its step and save before it is killed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from apr_dist.config import TrainConfig
from apr_dist.runs.folder import RunFolder
from apr_dist.runs.opening import BYTES_PER_WEIGHT

DISK_BYTES_PER_S = 0.5e9
"""Assumed speed of writing where nobody gives one: a shared file system, not a fast local disk."""

MARGIN, LEAVING_S = 1.5, 30.0
"""What is advised to reserve: half as much again, and the time a launcher takes to end its processes."""


@dataclass(frozen=True, kw_only=True)
class StopTime:
    """Seconds between SIGTERM and the end of a run.

    Attributes:
        step_s: the longest step; None if it is neither measured nor estimated.
        step_from: where that comes from.
        save_s: writing one save.
        save_from: where that comes from.
        saves: how many may have to be written: the one under way and the last one.
        grace_s: what is reserved before the processes are killed; None if it is not known.
    """

    step_s: float | None
    step_from: str
    save_s: float
    save_from: str
    saves: int
    grace_s: float | None

    @property
    def needed_s(self) -> float | None:
        """Seconds that finishing and saving take at most; None if the step's are not known."""
        return None if self.step_s is None else self.step_s + self.saves * self.save_s

    @property
    def advised_s(self) -> int | None:
        """Seconds to reserve, in whole tens; None if the step's are not known."""
        return None if self.needed_s is None else 10 * math.ceil((MARGIN * self.needed_s + LEAVING_S) / 10)

    @property
    def suffices(self) -> bool | None:
        """Whether the reserved time is enough; None if one of the two is not known."""
        return None if self.needed_s is None or self.grace_s is None else self.needed_s <= self.grace_s

    @property
    def warning(self) -> str | None:
        """The warning that the time does not suffice; None otherwise."""
        if self.suffices is not False:
            return None
        return (
            f"{self.grace_s:,.0f} s between SIGTERM and SIGKILL do not suffice: a step and saving take"
            f" {self.needed_s:,.0f} s, and a run that is killed loses what it did since its last save;"
            f" reserve {self.advised_s:,} s (Slurm: --signal=B:TERM@{self.advised_s}, torchrun:"
            f" --shutdown_timeout {self.advised_s} less 30, Kubernetes: terminationGracePeriodSeconds)"
        )

    def lines(self) -> Iterator[str]:
        """What it takes, and whether it suffices."""
        saves = (
            f"{self.saves} saves of {self.save_s:,.1f} s"
            if self.saves > 1
            else f"a save of {self.save_s:,.1f} s"
        )
        if self.step_s is None:
            yield (
                f"stop          unknown: a step's time is not ({self.step_from}); {saves} ({self.save_from})"
            )
            return
        verdict = {
            True: f"; {self.grace_s:,.0f} s suffice" if self.grace_s else "",
            False: f"; {self.grace_s or 0:,.0f} s do NOT suffice",
            None: f"; reserve {self.advised_s:,} s (torchrun and Kubernetes reserve 30 by themselves)",
        }[self.suffices]
        yield (
            f"stop          {self.needed_s:,.1f} s from SIGTERM to the end: a step of {self.step_s:,.1f} s"
            f" ({self.step_from}), {saves} ({self.save_from}){verdict}"
        )


def stop_time(
    config: TrainConfig,
    *,
    parameters: int,
    tokens_per_s: float | None,
    grace_s: float | None,
    disk_bytes_per_s: float | None,
) -> StopTime:
    """What stopping takes, measured in the run folder where it has metrics, else estimated.

    Args:
        config: the resolved configuration.
        parameters: of the model.
        tokens_per_s: speed of the whole run, if it was given.
        grace_s: seconds between SIGTERM and SIGKILL, if they were given.
        disk_bytes_per_s: what the disk writes, if it was given.
    """
    steps, saves = _measured(RunFolder(config.run_dir).metrics)
    if steps:
        step_s, step_from = max(steps), f"the longest of {len(steps)} in {config.run_dir}"
    elif tokens_per_s:
        step_s = config.batch_size * config.seq_length / tokens_per_s
        step_from = "from the speed given"
    else:
        step_s, step_from = None, "give --tokens-per-second, or a --run-dir with metrics"
    background, size = config.checkpoint.background, parameters * BYTES_PER_WEIGHT
    rate = disk_bytes_per_s or DISK_BYTES_PER_S
    save_s, said = size / rate, "given" if disk_bytes_per_s else "assumed; --disk gives another"
    save_from = f"{size / 1e9:,.2f} GB at {rate / 1e9:g} GB/s, {said}"
    if saves and not background:  # a save in the background is measured as what it holds up a step
        save_s, save_from = max(saves), f"the longest of {len(saves)} in {config.run_dir}"
    return StopTime(
        step_s=step_s,
        step_from=step_from,
        save_s=save_s,
        save_from=save_from,
        saves=2 if background else 1,
        grace_s=grace_s,
    )


def _measured(metrics: Path) -> tuple[list[float], list[float]]:
    """Seconds of the steps and of the saves of a run; none if it has no metrics that can be read."""
    steps: list[float] = []
    saves: list[float] = []
    try:
        text = metrics.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return [], []
    for line in text.split("\n")[:-1]:
        try:
            found = json.loads(line)
            {"step": steps, "save": saves}.get(found["kind"], []).append(found["wall_ms"] / 1e3)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return steps, saves
