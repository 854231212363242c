"""What a run folder says, read leniently: a run that was aborted, or still runs, has a report too."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apr_dist.config.reading import read_tree
from apr_dist.errors import UsageError
from apr_dist.parsing import parse_json
from apr_dist.runs.folder import RunFolder
from apr_dist.runs.resume import flat

STEP_PARTS = {"forward_ms": "forward", "backward_ms": "backward", "update_ms": "update"}
UNDIVIDED = "forward, backward, update"
"""What a step did besides waiting, where its line does not tell the parts."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run as its folder tells it.

    Attributes:
        name: name of the folder, made unique among the runs of a page.
        folder: the run folder.
        steps: the step lines of metrics.jsonl.
        evaluations: its evaluation lines.
        others: its lines of other kinds: loads and saves with what they took.
        verdict: verdict.json, or None where the run did not come to one.
        values: the configuration, flat: dotted key to value as text.
    """

    name: str
    folder: Path
    steps: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    others: Sequence[Mapping[str, Any]]
    verdict: Mapping[str, Any] | None
    values: Mapping[str, str]

    @property
    def status(self) -> str:
        """How the run ended, as verdict.json says."""
        return str(self.verdict["status"]) if self.verdict else "NO VERDICT"

    @property
    def adapter(self) -> str | None:
        """The adapter that was trained in place of the weights, in words."""
        kind, rank, alpha = (self.values.get(f"adapter.{key}", "off") for key in ("kind", "rank", "alpha"))
        if kind == "off":
            return None
        bits = self.verdict["facts"].get("base_bits") if self.verdict else None
        beside = f", beside a base in {bits} bits" if bits else ""
        return f"{kind} of rank {rank}, alpha {alpha}{beside}"

    @property
    def gates(self) -> Sequence[Mapping[str, Any]]:
        """Every gate that was evaluated, in order."""
        return self.verdict["gates"] if self.verdict else ()

    @property
    def val_losses(self) -> list[float]:
        """The finite validation losses, oldest first."""
        return [line["val_loss"] for line in self.evaluations if line.get("val_loss") is not None]

    @property
    def experts(self) -> Mapping[str, Any] | None:
        """What the newest evaluation line says of a mixture's routers; None for a dense model."""
        return next((line["router"] for line in reversed(self.evaluations) if line.get("router")), None)

    def set_losses(self) -> dict[str, tuple[list[int], list[float]]]:
        """(steps, finite losses) of each named validation set that does not count."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for line in self.evaluations:
            for name, loss in (line.get("val_losses") or {}).items():
                if loss is not None:
                    steps, losses = found.setdefault(name, ([], []))
                    steps.append(line["step"])
                    losses.append(loss)
        return found

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one figure of the step lines that have it, also one of ``router``."""
        group, _, within = key.rpartition(".")
        lines = [
            (line["step"], line.get(group) or {}) if group else (line["step"], line) for line in self.steps
        ]
        found = [(step, figures[within]) for step, figures in lines if figures.get(within) is not None]
        return [step for step, _ in found], [value for _, value in found]

    @property
    def phases_s(self) -> dict[str, float]:
        """Seconds by what they were spent on, as far as the lines tell; the phases do not overlap."""
        names = (*STEP_PARTS.values(), UNDIVIDED, "rest of the steps", "waiting for data")
        found = dict.fromkeys(names, 0.0)
        for line in self.steps:
            for phase, took in _parts_ms(line).items():
                found[phase] += took
        found["evaluating"] = sum(line.get("wall_ms", 0.0) for line in self.evaluations)
        for kind, words in (("save", "saving"), ("load", "loading"), ("answers", "answering prompts")):
            found[words] = sum(line.get("wall_ms", 0.0) for line in self.others if line.get("kind") == kind)
        return {words: took / 1e3 for words, took in found.items()}

    def median(self, key: str) -> float | None:
        """Median of one figure over all steps, or None without steps."""
        _, values = self.series(key)
        return statistics.median(values) if values else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, giving equally named ones their whole path as a name.

    Raises:
        UsageError: a folder holds neither metrics nor a verdict, or a file in it is not JSON.
    """
    names = [folder.resolve().name for folder in folders]
    return [
        _read(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The keys on which not all runs agree, each with the value of every run."""
    keys = dict.fromkeys(key for run in runs for key in run.values)
    rows = [(key, [run.values.get(key, "not recorded") for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _parts_ms(line: Mapping[str, Any]) -> dict[str, float]:
    """What a step's wall time went into. A wait for data that hid behind computing is none."""
    wall, waited = line.get("wall_ms", 0.0), line.get("data_wait_ms", 0.0)
    if any(key not in line for key in STEP_PARTS):  # of a version that did not tell
        return {UNDIVIDED: wall - waited, "waiting for data": waited}
    found = {words: line[key] for key, words in STEP_PARTS.items()}
    rest = max(wall - sum(found.values()), 0.0)
    found["waiting for data"] = min(waited, rest)
    return {**found, "rest of the steps": rest - found["waiting for data"]}


def _read(folder: Path, name: str) -> Run:
    run = RunFolder(folder)
    metrics, verdict, config = run.metrics, run.verdict, run.config
    if not metrics.is_file() and not verdict.is_file():
        raise no_run(
            folder,
            f"neither {metrics.name} nor {verdict.name} is there",
            expected="the folder a run wrote into",
        )
    lines = _json_lines(metrics) if metrics.is_file() else []
    return Run(
        name=name,
        folder=folder,
        steps=[line for line in lines if line.get("kind") == "step"],
        evaluations=[line for line in lines if line.get("kind") == "evaluation"],
        others=[line for line in lines if line.get("kind") not in ("step", "evaluation")],
        verdict=_verdict(verdict) if verdict.is_file() else None,
        values={key: str(value) for key, value in flat(read_tree(config)).items()}
        if config.is_file()
        else {},
    )


def _json_lines(path: Path) -> list[dict[str, Any]]:
    # A run that was killed, or still writes, leaves its last line unfinished.
    whole = read_text(path).split("\n")[:-1]
    return [read_object(path, line) for line in whole if line]


def read_object(path: Path, text: str) -> dict[str, Any]:
    """The JSON object in a text of the file at ``path``.

    Raises:
        UsageError: it is none.
    """
    try:
        found = parse_json(text)
    except ValueError as error:
        raise no_run(path, f"it is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise no_run(path, f"it holds a JSON {type(found).__name__}")
    return found


def _verdict(path: Path) -> dict[str, Any]:
    found = read_object(path, read_text(path))
    missing = [key for key in ("status", "detail", "exit_code", "gates", "facts") if key not in found]
    if missing:
        raise no_run(path, f"{', '.join(missing)} is missing")
    return found


def read_text(path: Path) -> str:
    """The text of a file of a run.

    Raises:
        UsageError: it cannot be read as text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise no_run(path, f"it cannot be read ({error})") from error


def no_run(path: Path, what: str, *, expected: str = "what a run writes there") -> UsageError:
    """The error of a file, or a folder, that no run left so."""
    return UsageError(what, where=path, expected=expected, remedy="give the --run-dir of a run")
