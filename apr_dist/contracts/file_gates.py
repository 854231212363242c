"""The gates that look at contract files alone, each a generator of findings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from apr_dist.contracts.finding import Finding, Gate
from apr_dist.contracts.ladder import rank
from apr_dist.contracts.repository import Repository
from apr_dist.contracts.schema import Contract, DecisionTable, Level, Status

_SEMVER = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")
_PLACES = ("apr_dist/", "rust_loader/", "contracts/", "docs/", "tests/", "configs/", "launch/", "benchmarks/")


def unique_ids(repository: Repository) -> Iterator[Finding]:
    """Every falsifier, obligation and decision table has a name of its own over all files."""
    seen: dict[str, Contract] = {}
    for contract in repository.contracts:
        body = contract.body
        named = [("falsification_tests", item.id) for item in body.falsification_tests]
        named += [("proof_obligations", item.id) for item in body.proof_obligations]
        named += [("decision_tables", item.id) for item in body.decision_tables]
        counts: dict[str, int] = {}
        for section, name in named:
            index = counts[section] = counts.get(section, -1) + 1
            if name in seen:
                text = f"id {name} is already in {seen[name].file}"
                yield contract.finding(Gate.UNIQUE_IDS, text, section, index, "id")
            seen.setdefault(name, contract)


def references(repository: Repository) -> Iterator[Finding]:
    """A contract names its sources, and those inside the repository exist."""
    for contract in repository.contracts:
        listed = contract.body.metadata.references
        if not listed:
            yield contract.finding(Gate.REFERENCES, "there is no reference", "metadata", "references")
        for index, reference in enumerate(listed):
            inside = reference.split()[0]
            if inside.startswith(_PLACES) and not (repository.root / inside).exists():
                text = f"{inside} does not exist"
                yield contract.finding(Gate.REFERENCES, text, "metadata", "references", index)


def dependencies(repository: Repository) -> Iterator[Finding]:
    """``depends_on`` names contracts that exist, and following it never comes back."""
    known = {contract.id: contract for contract in repository.contracts}
    for contract in repository.contracts:
        for index, name in enumerate(contract.body.metadata.depends_on):
            where = ("metadata", "depends_on", index)
            if name not in known:
                yield contract.finding(Gate.DEPENDENCIES, f"there is no contract {name}", *where)
            elif (circle := _way_back(known, name, contract.id)) is not None:
                text = f"a circle: {' -> '.join([contract.id, *circle])}"
                yield contract.finding(Gate.DEPENDENCIES, text, *where)


def _way_back(known: dict[str, Contract], start: str, goal: str) -> list[str] | None:
    """A path from ``start`` to ``goal`` along ``depends_on``, or None."""
    ways, seen = [[start]], {start}
    while ways:
        way = ways.pop()
        if way[-1] == goal:
            return way
        for name in known[way[-1]].body.metadata.depends_on if way[-1] in known else ():
            if name not in seen:
                seen.add(name)
                ways.append([*way, name])
    return None


def versions(repository: Repository) -> Iterator[Finding]:
    """Semantic versions; the newest changelog entry carries the file's; they and the dates grow."""
    for contract in repository.contracts:
        metadata = contract.body.metadata
        changes = metadata.changelog
        for index, change in enumerate(changes):
            where = ("metadata", "changelog", index)
            if _SEMVER.fullmatch(change.version) is None:
                yield contract.finding(Gate.VERSIONS, f"{change.version!r} is no semantic version", *where)
            elif index and _number(change.version) >= _number(changes[index - 1].version):
                text = f"{change.version} stands after {changes[index - 1].version}; the newest comes first"
                yield contract.finding(Gate.VERSIONS, text, *where)
            if index and change.date > changes[index - 1].date:
                text = f"{change.date} is later than the newer entry's {changes[index - 1].date}"
                yield contract.finding(Gate.VERSIONS, text, *where)
        if metadata.version != changes[0].version:
            text = f"version is {metadata.version} and the newest changelog entry says {changes[0].version}"
            yield contract.finding(Gate.VERSIONS, text, "metadata", "version")
        if metadata.updated != changes[0].date or metadata.created > metadata.updated:
            text = f"updated is {metadata.updated} and the newest changelog entry is of {changes[0].date}"
            yield contract.finding(Gate.VERSIONS, text, "metadata", "updated")


def _number(version: str) -> tuple[int, ...]:
    match = _SEMVER.fullmatch(version)
    return tuple(int(part) for part in match.groups()) if match else ()


def obligations(repository: Repository) -> Iterator[Finding]:
    """Every obligation has a falsifier, every falsifier an obligation, each about an equation."""
    for contract in repository.contracts:
        body = contract.body
        known = {obligation.id for obligation in body.proof_obligations}
        used = {name for falsifier in body.falsification_tests for name in falsifier.obligations}
        formal: set[str] = set()
        for index, obligation in enumerate(body.proof_obligations):
            where = ("proof_obligations", index)
            if obligation.id not in used:
                yield contract.finding(Gate.OBLIGATIONS, f"no falsifier bears on {obligation.id}", *where)
            if obligation.applies_to not in {"all", *body.equations}:
                text = f"{obligation.id} applies to {obligation.applies_to}, which is no equation here"
                yield contract.finding(Gate.OBLIGATIONS, text, *where, "applies_to")
            if obligation.formal in formal:
                text = f"{obligation.id} says what another one says: {obligation.formal}"
                yield contract.finding(Gate.OBLIGATIONS, text, *where, "formal")
            formal.add(obligation.formal)
        for index, falsifier in enumerate(body.falsification_tests):
            for name in falsifier.obligations:
                if name not in known:
                    text = f"{falsifier.id} bears on {name}, which is no obligation here"
                    yield contract.finding(Gate.OBLIGATIONS, text, "falsification_tests", index)


def decision_tables(repository: Repository) -> Iterator[Finding]:
    """A table belongs to an obligation, is whole, and gives every combination exactly once."""
    for contract in repository.contracts:
        known = {obligation.id for obligation in contract.body.proof_obligations}
        for index, table in enumerate(contract.body.decision_tables):
            where = ("decision_tables", index)
            if table.obligation not in known:
                text = f"{table.id} decides {table.obligation}, which is no obligation here"
                yield contract.finding(Gate.DECISION_TABLES, text, *where, "obligation")
            for text in _table_problems(table):
                yield contract.finding(Gate.DECISION_TABLES, f"{table.id}: {text}", *where, "cells")


def _table_problems(table: DecisionTable) -> Iterator[str]:
    if len(table.cells) != table.bound:
        yield f"bound is {table.bound} and there are {len(table.cells)} cells"
    if len({frozenset(cell) for cell in table.cells}) > 1 or any("outcome" not in c for c in table.cells):
        yield "the cells do not all give the same keys, outcome among them"
        return
    inputs = [tuple(repr(v) for k, v in sorted(cell.items()) if k != "outcome") for cell in table.cells]
    if len(set(inputs)) != len(inputs):
        yield "a combination is given twice"
        return
    combinations = math.prod(len(set(values)) for values in zip(*inputs, strict=True))
    if combinations != len(set(inputs)):
        yield f"{combinations} combinations exist and {len(set(inputs))} are given"


def summary(repository: Repository) -> Iterator[Finding]:
    """The counts and the status a file gives of itself are true."""
    for contract in repository.contracts:
        told = contract.body.verification_summary
        counted = count_summary(contract)
        for name, value in counted.items():
            if getattr(told, name) != value:
                text = f"{name} is {getattr(told, name)} and {value} by count"
                yield contract.finding(Gate.SUMMARY, text, "verification_summary", name)


def count_summary(contract: Contract) -> dict[str, int | Status]:
    """What ``verification_summary`` of a contract has to say.

    An obligation is tested when every falsifier that bears on it has a test, and live when one of
    them is DISCHARGED.
    """
    tested = live = 0
    for obligation in contract.body.proof_obligations:
        own = [falsifier for falsifier in contract.falsifiers if obligation.id in falsifier.obligations]
        tested += bool(own) and all(falsifier.nodes for falsifier in own)
        live += any(rank(falsifier.status) == rank(Level.DISCHARGED) for falsifier in own)
    return {
        "total_obligations": len(contract.body.proof_obligations),
        "tested": tested,
        "live": live,
        "status": contract.body.metadata.status,
    }
