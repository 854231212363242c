"""The status ladder: what tests and evidence allow a falsifier and a contract to claim.

PROPOSED has nothing; PARTIAL_ALGORITHM_LEVEL has a bound test; FUNCTIONAL has one that goes through a
entry point; DISCHARGED has a kept outcome of the real run. A contract is as good as its falsifiers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from apr_dist.contracts.binding import SuiteTest
from apr_dist.contracts.evidence import evidence_problem
from apr_dist.contracts.results import LastResult, Outcome
from apr_dist.contracts.schema import Falsifier, Level, Status

_RANK = {level: rank for rank, level in enumerate(Level)}


def rank(level: Level) -> int:
    """0 for PROPOSED to 3 for DISCHARGED."""
    return _RANK[level]


def supported_level(
    falsifier: Falsifier,
    bound: Iterable[SuiteTest],
    results: Mapping[str, LastResult],
    root: Path,
) -> Level:
    """The highest level that what exists allows.

    Args:
        falsifier: the promise.
        bound: the tests that carry its id.
        results: last results; a bound test that failed takes all above PARTIAL away, one never run does not.
        root: the repository, for evidence files.
    """
    bound = list(bound)
    failed = any(
        (found := results.get(test.node)) is not None and found.outcome is Outcome.FAILED for test in bound
    )
    if not failed and any(
        evidence_problem(falsifier.id, root / live.evidence) is None for live in falsifier.live
    ):
        return Level.DISCHARGED
    if not bound:
        return Level.PROPOSED
    if any(test.entry_point for test in bound) and not failed:
        return Level.FUNCTIONAL
    return Level.PARTIAL_ALGORITHM_LEVEL


def supported_statuses(falsifiers: Iterable[Falsifier]) -> tuple[Status, ...]:
    """Every status that a contract with these claims may carry, the best one last."""
    falsifiers = list(falsifiers)
    ranks = [rank(falsifier.status) for falsifier in falsifiers]
    needed = [rank(falsifier.status) for falsifier in falsifiers if falsifier.ship_blocking] or ranks
    live = [rank(falsifier.status) for falsifier in falsifiers if falsifier.live]
    allowed = [Status.PROPOSED]
    if max(ranks) >= rank(Level.PARTIAL_ALGORITHM_LEVEL):
        allowed.append(Status.DRAFT)
    if max(ranks) == rank(Level.DISCHARGED):
        allowed.append(Status.DRAFT_PARTIAL_DISCHARGE)
    if min(needed) >= rank(Level.PARTIAL_ALGORITHM_LEVEL):
        allowed.append(Status.PARTIAL_ALGORITHM_LEVEL)
    if min(needed) >= rank(Level.FUNCTIONAL):
        allowed += [Status.FUNCTIONAL, Status.ACTIVE_RUNTIME]
        if live and min(live) == rank(Level.DISCHARGED):
            allowed.append(Status.DISCHARGED)
    return tuple(allowed)
