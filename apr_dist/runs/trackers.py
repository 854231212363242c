"""Trackers by Accelerate's own names, told the same lines as metrics.jsonl.

Which names there are is in ``choices``, and whether one is installed is for the gates. Here is how each is
started, told and left alone when it fails: a tracker is a view of a run, never a reason to stop one.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from apr_dist.atomic_files import write_atomically
from apr_dist.choices import TRACKER_OPTIONS
from apr_dist.config.sections import TrackingSection
from apr_dist.parsing import parse_json
from apr_dist.runs.checkpoint import json_bytes
from apr_dist.runs.folder import RunFolder
from apr_dist.runs.history import identity

_ABOUT_THE_LINE = ("kind", "step", "synthetic")


class Trackers:
    """The trackers of one run; each that fails is left out from then on, with one warning.

    Args:
        names: Accelerate's names; on ranks other than 0 there are none.
        run_dir: the run folder; a tracker that writes files writes below it.
        run: identity of the run; with what the run folder keeps, it names the run to a tracker that resumes.
        options: project, entity, group and tags.
        values: the configuration, flat.
        warn: shows a warning.
        resumed_step: last step that stays when a run resumes; None: a new run.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        run_dir: Path,
        run: str,
        options: TrackingSection,
        values: Mapping[str, Any],
        warn: Callable[[str], None],
        resumed_step: int | None = None,
    ) -> None:
        self._warn, self._run, self._options = warn, run, options
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
            tracker = kind(run_dir.name or self._options.project, logging_dir=folder, **purged)
        elif kind.requires_logging_directory:
            tracker = kind(self._options.project, logging_dir=folder)
        else:
            tracker = kind(self._options.project, **self._init_arguments(name, run_dir))
        tracker.start()
        self._running[name] = tracker
        tracker.store_init_configuration({key: _plain(value) for key, value in values.items()})

    def _init_arguments(self, name: str, run_dir: Path) -> dict[str, Any]:
        """Arguments of the tracker's own ``init`` that make a resumed run the same run there."""
        words = TRACKER_OPTIONS.get(name)
        if words is None:
            return {}
        own_id = identity(self._run, _kept_word(RunFolder(run_dir)))
        given: dict[str, Any] = {
            "name": run_dir.name if "id" in words else f"{run_dir.name}-{own_id[:8]}",
            "id": own_id,
            "entity": self._options.entity,
            "group": self._options.group,
            "tags": [tag.strip() for tag in self._options.tags.split(",") if tag.strip()],
        }
        set_here = {words[key]: value for key, value in given.items() if key in words and value}
        return {**set_here, "resume": "allow"}

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


def _kept_word(run: RunFolder) -> str:
    """A random word that the run folder keeps: equal runs have equal identities and are two in a tracker."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(parse_json(run.trackers.read_text(encoding="utf-8"))["word"])
    word = secrets.token_hex(8)
    write_atomically(run.trackers, json_bytes({"word": word}))
    return word


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
