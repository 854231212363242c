"""All gates in order, and the report of what each found.

``validate`` is the schema gate alone; ``lint`` runs every gate. When a file does not follow the schema
the other gates are not asked, for half of what they look at would be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from apr_dist.contracts import file_gates, suite_gates
from apr_dist.contracts.finding import Finding, Gate
from apr_dist.contracts.repository import Repository, read_contracts

_GATES: Mapping[Gate, Callable[[Repository], Iterator[Finding]]] = {
    Gate.UNIQUE_IDS: file_gates.unique_ids,
    Gate.REFERENCES: file_gates.references,
    Gate.DEPENDENCIES: file_gates.dependencies,
    Gate.VERSIONS: file_gates.versions,
    Gate.OBLIGATIONS: file_gates.obligations,
    Gate.DECISION_TABLES: file_gates.decision_tables,
    Gate.SUMMARY: file_gates.summary,
    Gate.TEST_EXISTS: suite_gates.tests_exist,
    Gate.TEST_MARKED: suite_gates.tests_marked,
    Gate.MARKER_KNOWN: suite_gates.markers_known,
    Gate.BOUND_ONCE: suite_gates.bound_once,
    Gate.STATUS: suite_gates.status,
    Gate.EVIDENCE: suite_gates.evidence,
    Gate.SOURCE_IDS: suite_gates.source_ids,
    Gate.MUTANTS: suite_gates.mutants,
}


@dataclass(frozen=True)
class GateOutcome:
    """One gate's answer.

    Attributes:
        gate: which.
        says: what it checks, in one sentence.
        findings: what it found; empty when it passed.
        skipped: why it was not asked, or None.
    """

    gate: Gate
    says: str
    findings: tuple[Finding, ...]
    skipped: str | None = None

    @property
    def passed(self) -> bool:
        """Whether it was asked and found nothing."""
        return self.skipped is None and not self.findings


@dataclass(frozen=True)
class LintReport:
    """What every gate answered, in order."""

    outcomes: tuple[GateOutcome, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Everything that was found, in file and line order."""
        return tuple(sorted(finding for outcome in self.outcomes for finding in outcome.findings))

    @property
    def ok(self) -> bool:
        """Whether no gate found anything."""
        return not self.findings


def validate(root: Path) -> tuple[Finding, ...]:
    """What does not follow the schema in ``root/contracts/*.yaml``.

    Raises:
        UsageError: a file cannot be read as text.
    """
    return read_contracts(root)[1]


def lint(repository: Repository, *, collected: Mapping[str, int] | None = None) -> LintReport:
    """Run every gate.

    Args:
        repository: the checkout.
        collected: what pytest collects (``collection.collect``); None skips that one gate.
    """
    schema = GateOutcome(Gate.SCHEMA, "every file follows the schema", repository.findings)
    outcomes = [schema]
    for gate, check in _GATES.items():
        says = _first_line(check)
        if schema.findings:
            outcomes.append(GateOutcome(gate, says, (), skipped="a file does not follow the schema"))
        else:
            outcomes.append(GateOutcome(gate, says, tuple(sorted(check(repository)))))
    outcomes.append(_collection(repository, collected, skip=bool(schema.findings)))
    return LintReport(tuple(outcomes))


def _collection(repository: Repository, collected: Mapping[str, int] | None, *, skip: bool) -> GateOutcome:
    says = _first_line(suite_gates.tests_collected)
    if collected is None or skip:
        reason = "a file does not follow the schema" if skip else "pytest was not asked what it collects"
        return GateOutcome(Gate.TEST_COLLECTED, says, (), skipped=reason)
    findings = tuple(sorted(suite_gates.tests_collected(repository, collected)))
    return GateOutcome(Gate.TEST_COLLECTED, says, findings)


def _first_line(check: Callable[..., object]) -> str:
    return (check.__doc__ or "").strip().splitlines()[0].rstrip(".")
