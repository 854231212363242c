"""The gates that hold contracts against the suite, the sources and the evidence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from apr_dist.contracts.binding import SuiteTest
from apr_dist.contracts.evidence import evidence_problem, folder_problem
from apr_dist.contracts.finding import Finding, Gate
from apr_dist.contracts.ladder import rank, supported_level, supported_statuses
from apr_dist.contracts.mutant_table import FOLDER, falsifiers_with_a_mutant
from apr_dist.contracts.repository import Repository
from apr_dist.contracts.schema import Contract, Level

_FALSIFIERS, _TABLES = "falsification_tests", "decision_tables"


def tests_exist(repository: Repository) -> Iterator[Finding]:
    """Every test that is named is a test function of the suite."""
    for contract, where, owner, node in _named(repository):
        if node not in repository.tests:
            near = _same_name(repository, node)
            text = f"{owner}: {node} does not exist" + (f"; did you mean {near}?" if near else "")
            yield contract.finding(Gate.TEST_EXISTS, text, *where)


def tests_collected(repository: Repository, cases: Mapping[str, int]) -> Iterator[Finding]:
    """Every test that is named is collected by pytest, a table's with a case for every cell.

    Args:
        repository: the checkout.
        cases: what pytest collected, see ``collection.collect``.
    """
    for contract, where, owner, node in _named(repository):
        if node in repository.tests and node not in cases:
            text = f"{owner}: pytest does not collect {node}"
            yield contract.finding(Gate.TEST_COLLECTED, text, *where)
    for contract in repository.contracts:
        for index, table in enumerate(contract.body.decision_tables):
            if table.test in cases and cases[table.test] < table.bound:
                text = f"{table.id}: {table.test} has {cases[table.test]} cases for {table.bound} cells"
                yield contract.finding(Gate.TEST_COLLECTED, text, _TABLES, index, "test")


def tests_marked(repository: Repository) -> Iterator[Finding]:
    """Every test that a falsifier names carries its marker."""
    for contract, index, falsifier in repository.falsifiers():
        for node in falsifier.nodes:
            test = repository.tests.get(node)
            if test is not None and falsifier.id not in test.ids:
                text = f'{node} does not carry @pytest.mark.falsifies("{falsifier.id}")'
                yield contract.finding(Gate.TEST_MARKED, text, _FALSIFIERS, index, "test")


def markers_known(repository: Repository) -> Iterator[Finding]:
    """Every marker names, in plain text, a falsifier that exists and that names a test."""
    named = {falsifier.id: falsifier for _, _, falsifier in repository.falsifiers()}
    for test in repository.tests.values():
        for marker in test.markers:
            if not marker.literal:
                text = f"{test.node}: a marker must give its ids as plain strings"
                yield Finding(test.file, marker.line, Gate.MARKER_KNOWN, text)
            for name in marker.ids:
                if name not in named:
                    text = f"{test.node} carries {name}, which is in no contract"
                elif not named[name].nodes:
                    text = (
                        f"{name} names no test, and {test.node} carries it: bind it with `test: {test.node}`"
                    )
                else:
                    continue
                yield Finding(test.file, marker.line, Gate.MARKER_KNOWN, text)


def bound_once(repository: Repository) -> Iterator[Finding]:
    """A test is bound to several falsifiers only by one marker that lists them."""
    for test in repository.tests.values():
        own = [marker for marker in test.markers if not marker.case]
        names = [name for marker in own for name in marker.ids]
        if len(own) > 1:
            text = f"{test.node} is bound by {len(own)} markers; list the ids in one: {', '.join(names)}"
            yield Finding(test.file, own[-1].line, Gate.BOUND_ONCE, text)
        elif len(names) != len(set(names)):
            yield Finding(test.file, own[0].line, Gate.BOUND_ONCE, f"{test.node} is bound twice to one id")
        if test.redefined:
            text = f"{test.node} is defined twice, and the first one never runs"
            yield Finding(test.file, test.line, Gate.BOUND_ONCE, text)


def status(repository: Repository) -> Iterator[Finding]:
    """No claim above what tests and evidence show; what is shown is not called PROPOSED."""
    for contract, index, falsifier in repository.falsifiers():
        where = (_FALSIFIERS, index, "status")
        bound = repository.bound.get(falsifier.id, [])
        shown = supported_level(falsifier, bound, repository.results, repository.root)
        if rank(falsifier.status) > rank(shown):
            text = f"{falsifier.id} claims {falsifier.status}; what is bound shows {shown}"
            yield contract.finding(Gate.STATUS, text, *where)
        if falsifier.status is Level.PROPOSED and falsifier.nodes:
            yield contract.finding(Gate.STATUS, f"{falsifier.id} names a test and is called PROPOSED", *where)
        if falsifier.status is not Level.PROPOSED and not falsifier.test:
            yield contract.finding(
                Gate.STATUS, f"{falsifier.id} claims {falsifier.status} and names no test", *where
            )
    for contract in repository.contracts:
        claimed, allowed = contract.body.metadata.status, supported_statuses(contract.falsifiers)
        if claimed not in allowed:
            text = f"the contract claims {claimed}; its falsifiers show at most {allowed[-1]}"
            yield contract.finding(Gate.STATUS, text, "metadata", "status")


def evidence(repository: Repository) -> Iterator[Finding]:
    """A live falsifier that claims its result has a kept outcome that shows it, as it was signed."""
    for contract, index, falsifier in repository.falsifiers():
        for live in falsifier.live:
            where = (_FALSIFIERS, index, "test")
            path = repository.root / live.evidence
            if not live.evidence.as_posix().startswith("contracts/evidence/"):
                text = f"{falsifier.id}: evidence is kept under contracts/evidence/, not at {live.evidence}"
                yield contract.finding(Gate.EVIDENCE, text, *where)
            # What hardware decides may be kept as not met; it discharges nothing then.
            claims = falsifier.status is Level.DISCHARGED or falsifier.ship_blocking
            problem = evidence_problem(falsifier.id, path) if claims else folder_problem(path)
            if falsifier.status is not Level.DISCHARGED and not path.parent.exists():
                problem = None
            if problem is not None:
                yield contract.finding(Gate.EVIDENCE, f"{falsifier.id}: {live.evidence} {problem}", *where)
        if falsifier.status is Level.DISCHARGED and not falsifier.live:
            text = f"{falsifier.id} is called DISCHARGED and has no live part"
            yield contract.finding(Gate.EVIDENCE, text, _FALSIFIERS, index, "status")


def mutants(repository: Repository) -> Iterator[Finding]:
    """Every falsifier that names a test has a mutant that must turn it red, and no mutant is of another."""
    tried = falsifiers_with_a_mutant(repository.root)
    known = {falsifier.id: falsifier for _, _, falsifier in repository.falsifiers()}
    for contract, index, falsifier in repository.falsifiers():
        if falsifier.nodes and falsifier.id not in tried:
            text = f"{falsifier.id} has no mutant in {FOLDER}: nothing shows that its tests can fail"
            yield contract.finding(Gate.MUTANTS, text, _FALSIFIERS, index, "test")
    for name in sorted(tried - set(known)):
        yield Finding(FOLDER, 1, Gate.MUTANTS, f"a mutant is of {name}, which is in no contract")


def source_ids(repository: Repository) -> Iterator[Finding]:
    """Every id that an error, a gate or a comment of the program names is in a contract."""
    known = {falsifier.id for _, _, falsifier in repository.falsifiers()}
    known |= {item.id for contract in repository.contracts for item in contract.body.proof_obligations}
    for cited in repository.citations():
        if cited.id not in known:
            yield Finding(cited.file, cited.line, Gate.SOURCE_IDS, f"{cited.id} is in no contract")


def _named(repository: Repository) -> Iterator[tuple[Contract, tuple[str | int, ...], str, str]]:
    """Every (contract, place, owner, node id) that a falsifier or a table names."""
    for contract, index, falsifier in repository.falsifiers():
        for node in falsifier.nodes:
            yield contract, (_FALSIFIERS, index, "test"), falsifier.id, node
    for contract in repository.contracts:
        for index, table in enumerate(contract.body.decision_tables):
            yield contract, (_TABLES, index, "test"), table.id, table.test


def _same_name(repository: Repository, node: str) -> str | None:
    """The test of that name in another file, or the other test that carries what the name lost."""
    name = node.rsplit("::", 1)[-1]
    found: list[SuiteTest] = [t for t in repository.tests.values() if t.node.rsplit("::", 1)[-1] == name]
    return found[0].node if found else None
