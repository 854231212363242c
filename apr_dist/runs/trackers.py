"""Trackers by Accelerate's own names, told the same lines as metrics.jsonl.

Which names there are is in ``choices``, and whether one is installed is for the gates. Here is how each is
started, told and left alone when it fails: a tracker is a view of a run, never a reason to stop one.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

PROJECT = "apr-dist"
"""What a tracker that groups runs files them under."""

_ABOUT_THE_LINE = ("kind", "step", "synthetic")


class Trackers:
    """The trackers of one run; each that fails is left out from then on, with one warning.

    Args:
        names: Accelerate's names; on ranks other than 0 there are none.
        run_dir: the run folder; a tracker that writes files writes below it.
        values: the configuration, flat.
        warn: shows a warning.
        resumed_step: last step that stays when a run goes on; None begins anew.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        run_dir: Path,
        values: Mapping[str, Any],
        warn: Callable[[str], None],
        resumed_step: int | None = None,
    ) -> None:
        self._warn = warn
        self._running: dict[str, Any] = {}
        for name in names:
            self._guarded(name, lambda name=name: self._start(name, run_dir, values, resumed_step))  # type: ignore[misc]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name, tracker in list(self._running.items()):
            self._guarded(name, tracker.finish)
        self._running = {}

    def measured(self, line: Mapping[str, Any]) -> None:
        """Tell every tracker the figures of a line of metrics.jsonl, under the same keys."""
        figures = dict(_figures(line))
        for name, tracker in list(self._running.items()):
            self._guarded(name, lambda tracker=tracker: tracker.log(figures, step=line["step"]))  # type: ignore[misc]

    def _start(self, name: str, run_dir: Path, values: Mapping[str, Any], resumed_step: int | None) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # noqa: PLC0415  (imports PyTorch)

        kind, folder = LOGGER_TYPE_TO_CLASS[name], run_dir / name
        if resumed_step is None:
            shutil.rmtree(folder, ignore_errors=True)
        if name == "tensorboard":
            purged = {} if resumed_step is None else {"purge_step": resumed_step + 1}
            tracker = kind(run_dir.name or PROJECT, logging_dir=folder, **purged)
        elif kind.requires_logging_directory:
            tracker = kind(PROJECT, logging_dir=folder)
        else:
            named = {"name": run_dir.name} if name in ("wandb", "trackio") else {}
            tracker = kind(PROJECT, **named)
        tracker.start()
        self._running[name] = tracker
        tracker.store_init_configuration({key: _plain(value) for key, value in values.items()})

    def _guarded(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # whatever a tracker raises, training goes on
            self._running.pop(name, None)
            text = " ".join(str(error).split())[:300]
            self._warn(
                f"the tracker {name} failed and is told no more ({type(error).__name__}: {text});"
                " metrics.jsonl has everything"
            )


def _figures(line: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in line.items():
        if isinstance(value, Mapping):
            found += _figures(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value) and key not in _ABOUT_THE_LINE:
            found.append((prefix + key, value))
    return found


def _plain(value: object) -> str | int | float | bool:
    return value if isinstance(value, str | int | float | bool) else str(value)
