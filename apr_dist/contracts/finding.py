"""What a check found: one frozen record, always with a file, a line, the gate that spoke, and a text."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Gate(StrEnum):
    """The checks of ``apr-dist contracts lint``, each of which can fail alone."""

    SCHEMA = "schema"
    UNIQUE_IDS = "unique-ids"
    REFERENCES = "references"
    DEPENDENCIES = "dependencies"
    VERSIONS = "versions"
    OBLIGATIONS = "obligations"
    DECISION_TABLES = "decision-tables"
    TEST_EXISTS = "test-exists"
    TEST_COLLECTED = "test-collected"
    TEST_MARKED = "test-marked"
    MARKER_KNOWN = "marker-known"
    BOUND_ONCE = "bound-once"
    STATUS = "status"
    EVIDENCE = "evidence"
    SUMMARY = "summary"
    SOURCE_IDS = "source-ids"
    MUTANTS = "mutants"


@dataclass(frozen=True, order=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        file: where, relative to the repository.
        line: 1-based line in that file.
        gate: the check that found it.
        text: what was found and what was expected.
    """

    file: Path
    line: int
    gate: Gate
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: [{self.gate}] {self.text}"
