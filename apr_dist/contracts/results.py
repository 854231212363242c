"""The last result of every bound test, in one small JSON file that a test run leaves behind.

Writing lines of it while tests run is done by the hooks in ``tests/``; here are the file and what it
says. A result belongs to the code it was measured on: a digest of the sources goes with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from apr_dist.contracts.evidence import sources_digest
from apr_dist.parsing import parse_json

RESULTS_FILE = Path(".build/falsifiers.json")
"""Where a test run leaves its results, relative to the repository."""

MUTANTS_FILE = Path(".build/mutants.json")
"""Where the mutation run leaves its results, relative to the repository."""

SCHEMA = "apr-dist-falsifier-results-v1"


class Outcome(StrEnum):
    """How a test ended; see ``together`` for several cases of one."""

    PASSED = "passed"
    SKIPPED = "skipped"
    FAILED = "failed"


@dataclass(frozen=True)
class LastResult:
    """One test's last run.

    Attributes:
        outcome: how it ended.
        duration_s: seconds it took, all cases together.
        finished: when, as RFC 3339 in UTC.
        code: digest of the sources it ran on.
    """

    outcome: Outcome
    duration_s: float
    finished: str
    code: str


@dataclass(frozen=True)
class Mutant:
    """One way the code was broken, and what turned red.

    Attributes:
        falsifier: the id it was meant for.
        what: the change in words.
        file: the file that was changed.
        killed: whether a bound test failed.
        red: the tests that failed.
    """

    falsifier: str
    what: str
    file: str
    killed: bool
    red: tuple[str, ...]


def code_digest(root: Path) -> str:
    """``sha256:...`` over the package's sources and the tests, by name and content."""
    return sources_digest([*(root / "apr_dist").rglob("*.py"), *(root / "tests").rglob("*.py")], root)


def together(outcomes: Sequence[Outcome]) -> Outcome:
    """Failed if one failed; passed if one passed and the others were skipped; skipped if all were."""
    found = set(outcomes)
    return next(outcome for outcome in (Outcome.FAILED, Outcome.PASSED, Outcome.SKIPPED) if outcome in found)


def read_results(root: Path) -> dict[str, LastResult]:
    """The recorded results by node id; none when no run was recorded or the file is damaged."""
    tests = _read(root / RESULTS_FILE).get("tests")
    found: dict[str, LastResult] = {}
    for node, fields in tests.items() if isinstance(tests, dict) else ():
        try:
            found[node] = LastResult(**{**fields, "outcome": Outcome(fields["outcome"])})
        except (TypeError, KeyError, ValueError):
            continue
    return found


def record_results(root: Path, runs: Mapping[str, tuple[Outcome, float]]) -> Path:
    """Put the results of a run over those of earlier ones; tests that did not run keep theirs.

    Args:
        root: the repository.
        runs: outcome and seconds of each node id.
    """
    now, code = datetime.now(UTC).isoformat(timespec="seconds"), code_digest(root)
    tests = {node: asdict(result) for node, result in read_results(root).items()}
    for node, (outcome, seconds) in runs.items():
        tests[node] = asdict(LastResult(outcome, round(seconds, 3), now, code))
    return _write(root / RESULTS_FILE, {"schema": SCHEMA, "tests": dict(sorted(tests.items()))})


def read_mutants(root: Path) -> tuple[Mutant, ...]:
    """What the last mutation run recorded."""
    listed = _read(root / MUTANTS_FILE).get("mutants")
    found = []
    for fields in listed if isinstance(listed, list) else ():
        try:
            found.append(Mutant(**{**fields, "red": tuple(fields["red"])}))
        except (TypeError, KeyError):
            continue
    return tuple(found)


def record_mutants(root: Path, mutants: Sequence[Mutant]) -> Path:
    """Put these mutants over earlier runs of the same ones."""
    fresh = {(mutant.falsifier, mutant.what) for mutant in mutants}
    kept = [mutant for mutant in read_mutants(root) if (mutant.falsifier, mutant.what) not in fresh]
    every = sorted([*kept, *mutants], key=lambda mutant: (mutant.falsifier, mutant.what))
    return _write(root / MUTANTS_FILE, {"schema": SCHEMA, "mutants": [asdict(one) for one in every]})


def _read(path: Path) -> dict[str, object]:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path
