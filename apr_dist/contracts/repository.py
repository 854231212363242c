"""Everything the checks look at, read once: contracts, tests, results, sources."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from apr_dist.contracts.binding import SuiteTest, by_falsifier, read_tests
from apr_dist.contracts.finding import Finding
from apr_dist.contracts.results import LastResult, Mutant, read_mutants, read_results
from apr_dist.contracts.schema import Contract, Falsifier, read_contract
from apr_dist.errors import UsageError

_CITED = re.compile(r"\b(?:FALSIFY|INV|GATE)(?:-[A-Z0-9]+)+-\d{3}\b")


@dataclass(frozen=True)
class Citation:
    """An id that the program itself names."""

    id: str
    file: Path
    line: int


@dataclass(frozen=True)
class Repository:
    """A checkout, as the checks see it.

    Attributes:
        root: its folder.
        contracts: the files that follow the schema.
        findings: what is wrong with those that do not.
        tests: the suite's test functions by node id, from their text.
        results: the last result of each, where one is recorded.
        mutants: what the last mutation run recorded.
    """

    root: Path
    contracts: tuple[Contract, ...]
    findings: tuple[Finding, ...]
    tests: Mapping[str, SuiteTest]
    results: Mapping[str, LastResult]
    mutants: tuple[Mutant, ...]

    @cached_property
    def bound(self) -> Mapping[str, list[SuiteTest]]:
        """The tests that carry each id."""
        return by_falsifier(self.tests)

    def falsifiers(self) -> Iterator[tuple[Contract, int, Falsifier]]:
        """Every falsifier with its contract and its place in the file."""
        for contract in self.contracts:
            for index, falsifier in enumerate(contract.falsifiers):
                yield contract, index, falsifier

    def citations(self) -> Iterator[Citation]:
        """Every id that the package or the Rust crate names, in file and line order."""
        paths = [*(self.root / "apr_dist").rglob("*.py"), *(self.root / "rust_loader" / "src").rglob("*.rs")]
        for path in sorted(paths):
            if path.name == "fixes.py":  # what to do about an id is not where it is decided
                continue
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                for match in _CITED.finditer(line):
                    yield Citation(match.group(), path.relative_to(self.root), number)


def find_root(start: Path | None = None) -> Path:
    """The nearest folder, from ``start`` (the working folder) upwards, that holds ``contracts/``.

    Raises:
        UsageError: there is none; a wheel carries no contracts, a checkout does.
    """
    begin = (start or Path.cwd()).absolute()
    for folder in (begin, *begin.parents):
        if any((folder / "contracts").glob("*.yaml")):
            return folder
    raise UsageError(
        "there is no contracts/*.yaml here or in a folder above",
        where=begin,
        expected="a checkout of the project",
        remedy="run this in the checkout, or pass its folder",
    )


def read_repository(root: Path) -> Repository:
    """Read contracts, tests and results under ``root``; nothing of it is run.

    Raises:
        UsageError: a contract file cannot be read as text.
    """
    contracts, findings = read_contracts(root)
    return Repository(
        root=root,
        contracts=contracts,
        findings=findings,
        tests=read_tests(root),
        results=read_results(root),
        mutants=read_mutants(root),
    )


def read_contracts(root: Path) -> tuple[tuple[Contract, ...], tuple[Finding, ...]]:
    """Every ``contracts/*.yaml`` under ``root``: those that follow the schema, and all findings.

    Raises:
        UsageError: a file cannot be read as text.
    """
    contracts: list[Contract] = []
    findings: list[Finding] = []
    for path in sorted((root / "contracts").glob("*.yaml")):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"cannot be read ({error})", where=path, expected="a YAML file in UTF-8"
            ) from error
        contract, found = read_contract(text, path.relative_to(root))
        findings += found
        if contract is not None:
            contracts.append(contract)
    return tuple(contracts), tuple(findings)
