"""Where every promise stands: the table of ``status``, and the whole story of one id for ``explain``."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from apr_dist.contracts.binding import SuiteTest
from apr_dist.contracts.evidence import evidence_code, evidence_problem, package_digest
from apr_dist.contracts.ladder import supported_level, supported_statuses
from apr_dist.contracts.repository import Repository
from apr_dist.contracts.results import Outcome, code_digest, together
from apr_dist.contracts.schema import Contract, Falsifier, Level, Status
from apr_dist.errors import UsageError


class ProofKind(StrEnum):
    """What kind of thing stands behind a falsifier."""

    NOTHING = "none yet"
    UNIT = "unit"
    ENTRY_POINT = "entry point"
    LIVE = "live"


@dataclass(frozen=True)
class StatusRow:
    """One falsifier as ``status`` shows it.

    Attributes:
        id: its id.
        contract: the contract it belongs to.
        meaning: its rule.
        kind: what stands behind it.
        tests: node ids that carry it, those the contract names first.
        last_result: how they ended when last run, or ``not run``; ``, older code`` when sources changed.
        claimed: the level the contract file claims.
        shown: the level that tests, results and evidence show.
        mutants: how many ways of breaking it were tried.
        killed: how many of those turned a bound test red.
        ship_blocking: whether a failure stops a release.
    """

    id: str
    contract: str
    meaning: str
    kind: ProofKind
    tests: tuple[str, ...]
    last_result: str
    claimed: Level
    shown: Level
    mutants: int
    killed: int
    ship_blocking: bool


@dataclass(frozen=True)
class ContractRow:
    """One contract as ``status`` shows it.

    Attributes:
        id: its id.
        version: its semantic version.
        status: what the file claims.
        shown: the best status its falsifiers allow.
        bound: falsifiers with a test or evidence.
        falsifiers: how many it has.
        description: what it promises.
    """

    id: str
    version: str
    status: Status
    shown: Status
    bound: int
    falsifiers: int
    description: str


def status_rows(repository: Repository) -> tuple[StatusRow, ...]:
    """Every falsifier, contract by contract in the order of the files."""
    code = code_digest(repository.root)
    return tuple(_row(repository, contract, item, code) for contract, _, item in repository.falsifiers())


def contract_rows(repository: Repository) -> tuple[ContractRow, ...]:
    """Every contract."""
    return tuple(
        ContractRow(
            id=contract.id,
            version=contract.body.metadata.version,
            status=contract.body.metadata.status,
            shown=supported_statuses(contract.falsifiers)[-1],
            bound=sum(falsifier.status is not Level.PROPOSED for falsifier in contract.falsifiers),
            falsifiers=len(contract.falsifiers),
            description=" ".join(contract.body.metadata.description.split()),
        )
        for contract in repository.contracts
    )


def explain(repository: Repository, falsifier_id: str) -> tuple[str, ...]:
    """What a falsifier pins, why, by which tests, and how they failed when it was broken, as lines.

    Raises:
        UsageError: no contract has it; the nearest id is named.
    """
    known = {falsifier.id: (contract, falsifier) for contract, _, falsifier in repository.falsifiers()}
    if falsifier_id not in known:
        close = difflib.get_close_matches(falsifier_id, known, n=1, cutoff=0.3)
        raise UsageError(
            f"{falsifier_id} is in no contract",
            where=repository.root / "contracts",
            expected="an id that `apr-dist contracts status` lists",
            remedy=f"use {close[0]}" if close else None,
        )
    contract, falsifier = known[falsifier_id]
    row = _row(repository, contract, falsifier, code_digest(repository.root))
    return (
        *_promise(contract, falsifier),
        f"level         {row.claimed} claimed, {row.shown} shown",
        f"last result   {row.last_result}",
        *_tests(repository, falsifier),
        *_evidence(repository, falsifier),
        *_broken(repository, falsifier),
        *_raised(repository, falsifier),
    )


def _row(repository: Repository, contract: Contract, falsifier: Falsifier, code: str) -> StatusRow:
    tests = _bound(repository, falsifier)
    mutants = [mutant for mutant in repository.mutants if mutant.falsifier == falsifier.id]
    shown = supported_level(falsifier, tests, repository.results, repository.root)
    return StatusRow(
        id=falsifier.id,
        contract=contract.id,
        meaning=_plain(falsifier.rule),
        kind=_kind(tests, shown),
        tests=tuple(test.node for test in tests),
        last_result=_last_result(repository, tests, code) + _evidence_age(repository, falsifier),
        claimed=falsifier.status,
        shown=shown,
        mutants=len(mutants),
        killed=sum(mutant.killed for mutant in mutants),
        ship_blocking=falsifier.ship_blocking,
    )


def _bound(repository: Repository, falsifier: Falsifier) -> list[SuiteTest]:
    tests = repository.bound.get(falsifier.id, [])
    named = falsifier.nodes
    return sorted(tests, key=lambda t: (named.index(t.node) if t.node in named else len(named), t.node))


def _kind(tests: Sequence[SuiteTest], shown: Level) -> ProofKind:
    if shown is Level.DISCHARGED:
        return ProofKind.LIVE
    if not tests:
        return ProofKind.NOTHING
    return ProofKind.ENTRY_POINT if any(test.entry_point for test in tests) else ProofKind.UNIT


def _last_result(repository: Repository, tests: Sequence[SuiteTest], code: str) -> str:
    found = [repository.results[test.node] for test in tests if test.node in repository.results]
    if not found:
        return "not run" if tests else "-"
    outcome = together([result.outcome for result in found])
    if outcome is Outcome.PASSED and len(found) < len(tests):
        return f"{len(found)} of {len(tests)} passed, the rest not run"
    return outcome.value + ("" if all(result.code == code for result in found) else ", older code")


def _evidence_age(repository: Repository, falsifier: Falsifier) -> str:
    """Empty, unless kept evidence is of another state of the package."""
    code = package_digest(repository.root / "apr_dist")
    shows = [repository.root / live.evidence for live in falsifier.live]
    kept = [path for path in shows if evidence_problem(falsifier.id, path) is None]
    return ", evidence of other code" if any(evidence_code(path) != code for path in kept) else ""


def _promise(contract: Contract, falsifier: Falsifier) -> Iterator[str]:
    line = contract.source.line_of(("falsification_tests", contract.falsifiers.index(falsifier)))
    yield f"{falsifier.id}  ({contract.file}:{line}, {contract.id} {contract.body.metadata.version})"
    yield f"rule          {_plain(falsifier.rule)}"
    yield f"prediction    {_plain(falsifier.prediction)}"
    for obligation in contract.body.proof_obligations:
        if obligation.id in falsifier.obligations:
            yield f"why           {obligation.id} ({obligation.type}): {_plain(obligation.property)}"
    yield f"if it fails   {_plain(falsifier.if_fails)}"
    yield f"ship-blocking {'yes' if falsifier.ship_blocking else 'no (advisory)'}"
    for attempt in falsifier.counter_example_classes:
        yield f"tried         {_plain(attempt)}"


def _tests(repository: Repository, falsifier: Falsifier) -> Iterator[str]:
    for test in _bound(repository, falsifier):
        door = "entry point" if test.entry_point else "unit"
        yield f"test          {test.file}:{test.line} {test.node.rsplit('::', 1)[-1]} ({door})"


def _evidence(repository: Repository, falsifier: Falsifier) -> Iterator[str]:
    for live in falsifier.live:
        problem = evidence_problem(falsifier.id, repository.root / live.evidence)
        age = "" if problem else _evidence_age(repository, falsifier)
        yield f"evidence      {live.evidence}: {problem or 'shows it'}{age} ({live.command})"


def _broken(repository: Repository, falsifier: Falsifier) -> Iterator[str]:
    for mutant in repository.mutants:
        if mutant.falsifier == falsifier.id:
            red = ", ".join(node.rsplit("::", 1)[-1] for node in mutant.red)
            outcome = f"turned red: {red}" if mutant.killed else "SURVIVED"
            yield f"broken        {mutant.file}: {mutant.what}; {outcome}"


def _raised(repository: Repository, falsifier: Falsifier) -> Iterator[str]:
    for cited in repository.citations():
        if cited.id == falsifier.id:
            yield f"in the code   {cited.file}:{cited.line}"


def _plain(text: str) -> str:
    return " ".join(text.split())
