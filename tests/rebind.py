"""Writes into ``contracts/*.yaml`` what the markers in ``tests/`` say: tests, levels, counts, statuses.

Run it after binding or unbinding a test (``python tests/rebind.py``), read the diff, and give the
contract a new version when its promises changed. It never claims more than ``lint`` allows.
"""

from __future__ import annotations

import sys
from pathlib import Path

from apr_dist.contracts.file_gates import count_summary
from apr_dist.contracts.ladder import supported_level, supported_statuses
from apr_dist.contracts.repository import Repository, read_repository
from apr_dist.contracts.schema import Contract, Falsifier, Status

ROOT = Path(__file__).resolve().parent.parent
LADDER = (
    Status.PROPOSED,
    Status.DRAFT,
    Status.PARTIAL_ALGORITHM_LEVEL,
    Status.FUNCTIONAL,
    Status.DISCHARGED,
)


def main() -> int:
    """Rewrite every contract file, twice: statuses and counts follow from the levels."""
    for rewrite in (rebind_falsifiers, restate_contract):
        repository = read_repository(ROOT)
        for finding in repository.findings:
            print(finding, file=sys.stderr)
        if repository.findings:
            return 2
        for contract in repository.contracts:
            rewrite(repository, contract)
    return 0


def rebind_falsifiers(repository: Repository, contract: Contract) -> None:
    """Each falsifier names the tests that carry it, and the level they show."""
    path = repository.root / contract.file
    lines = path.read_text(encoding="utf-8").splitlines()
    for index in reversed(range(len(contract.falsifiers))):
        falsifier = contract.falsifiers[index]
        bound = repository.bound.get(falsifier.id, [])
        level = supported_level(falsifier, bound, {}, repository.root)
        where = ("falsification_tests", index)
        last = contract.source.lines[(*where, "if_fails")] - 1
        first = contract.source.lines.get((*where, "test"), last + 1) - 1
        lines[first:last] = test_lines(falsifier, [test.node for test in bound])
        lines[contract.source.lines[(*where, "status")] - 1] = f"    status: {level}"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_lines(falsifier: Falsifier, nodes: list[str]) -> list[str]:
    """The ``test:`` entry: the tests it already names first, then the others, then its live parts."""
    kept = [node for node in falsifier.nodes if node in nodes]
    live = [f"live: {live.command}; evidence: {live.evidence}" for live in falsifier.live]
    parts = [*kept, *sorted(set(nodes) - set(kept)), *live]
    if not parts:
        return []
    joined = [part + " &&" for part in parts[:-1]] + [parts[-1]]
    return ["    test: >-", *(f"      {part}" for part in joined)]


def restate_contract(repository: Repository, contract: Contract) -> None:
    """Status and counts as its falsifiers allow them."""
    path = repository.root / contract.file
    lines = path.read_text(encoding="utf-8").splitlines()
    allowed = supported_statuses(contract.falsifiers)
    status = next(step for step in reversed(LADDER) if step in allowed)
    lines[contract.source.lines[("metadata", "status")] - 1] = f"  status: {status}"
    for name, value in (count_summary(contract) | {"status": status}).items():
        lines[contract.source.lines[("verification_summary", name)] - 1] = f"  {name}: {value}"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
