"""What an id in an error means: the cause, what to do, and the exit code, from what the package carries.

The texts come from the contracts, which every installation carries, and from the errors in the package's own
source, so that an entry and the program say the same.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from apr_dist.contracts.fixes import FIXES
from apr_dist.contracts.refusals import Refusal, judged, refusals
from apr_dist.contracts.schema import Contract, Falsifier, read_contract
from apr_dist.errors import ExitCode, UsageError

PACKAGE = Path(__file__).resolve().parents[1]
CARRIED = Path(__file__).resolve().parent / "carried"
"""The contracts as an installation carries them; in a checkout, links to ``contracts/``."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One falsifier, as a user meets it in an error.

    Attributes:
        id: its id.
        contract: id of the contract it belongs to.
        description: what that contract promises.
        rule: what is promised.
        without: what would happen without it.
        causes: what errors with this id report; values are names in pointed brackets.
        fixes: what to do about them.
        exit_codes: what the process ends with; none if the id is no error's.
    """

    id: str
    contract: str
    description: str
    rule: str
    without: str
    causes: tuple[str, ...]
    fixes: tuple[str, ...]
    exit_codes: tuple[ExitCode, ...]

    def lines(self) -> Iterator[str]:
        """The entry as plain text."""
        yield self.id
        yield f"rule        {self.rule}"
        yield f"without it  {self.without}"
        for name, texts in (("cause", self.causes), ("fix", self.fixes)):
            for text in texts:
                yield f"{name:<12}{text}"
        for code in self.exit_codes:
            yield f"exit code   {int(code)} ({code.name}): {code.meaning}"


def entries() -> list[Entry]:
    """An entry for every falsifier, contract by contract."""
    raised, verdicts = refusals(PACKAGE), judged(PACKAGE)
    return [
        _entry(contract, falsifier, raised.get(falsifier.id, []), verdicts.get(falsifier.id, []))
        for path in sorted(CARRIED.glob("*.yaml"))
        if (contract := read_contract(path.read_text(encoding="utf-8"), Path("contracts") / path.name)[0])
        for falsifier in contract.falsifiers
    ]


def _entry(
    contract: Contract,
    falsifier: Falsifier,
    said: Sequence[Refusal],
    verdicts: Sequence[tuple[str, str]],
) -> Entry:
    codes: tuple[ExitCode, ...] = ()
    if said:
        causes, fixes, codes = _of_refusals(said)
    elif verdicts:
        causes = [f"{gate}: required {needed}, and something else was measured" for gate, needed in verdicts]
        fixes = [FIXES[falsifier.id]]
    else:
        causes, fixes = _of_property(contract, falsifier)
    return Entry(
        id=falsifier.id,
        contract=contract.id,
        description=_plain(contract.body.metadata.description),
        rule=_plain(falsifier.rule),
        without=_lowered(_plain(falsifier.if_fails)),
        causes=tuple(causes),
        fixes=tuple(fixes),
        exit_codes=codes,
    )


def entry_of(identifier: str) -> Entry:
    """The entry of one id, in any case.

    Raises:
        UsageError: there is no such id; the nearest is named.
    """
    known = {entry.id: entry for entry in entries()}
    asked = identifier.strip("[].").upper()
    if asked not in known:
        close = difflib.get_close_matches(asked, known, n=1, cutoff=0.3)
        raise UsageError(
            f"no error carries the id {identifier!r}",
            where="command line",
            expected="an id as an error prints it in brackets, such as FALSIFY-APR-DIST-TRAINER-004",
            remedy=f"apr-dist explain {close[0]}" if close else None,
        )
    return known[asked]


def _of_refusals(said: Sequence[Refusal]) -> tuple[list[str], list[str], tuple[ExitCode, ...]]:
    """What refusals report: each with what it found, then what they advise, then their exit codes."""
    told = [one for one in said if not re.fullmatch("<[^<>]*>", one.what)] or said
    causes = [one.what + (f"; expected {one.expected}" if one.expected else "") for one in told]
    fixes = [one.remedy for one in said if one.remedy]
    named = "fix what the message names: what was found, where, and what was expected"
    codes = tuple(sorted({ExitCode[one.exit_code] for one in said}))
    return list(dict.fromkeys(causes)), list(dict.fromkeys(fixes)) or [named], codes


def _of_property(contract: Contract, falsifier: Falsifier) -> tuple[list[str], list[str]]:
    """A promise about the program itself, which no setting breaks."""
    owed = [one.property for one in contract.body.proof_obligations if one.id in falsifier.obligations]
    tried = "; ".join(_plain(one) for one in falsifier.counter_example_classes)
    cause = (
        f"no file or setting: this is a property of the program ({_lowered(_plain(owed[0]).rstrip('.'))})."
        f" What its tests try: {tried}."
    )
    fix = (
        "a run that contradicts it has met a defect: report it. In a checkout, `apr-dist contracts explain"
        f" {falsifier.id}` names the tests to run"
    )
    return [cause], [fix]


def _plain(text: str) -> str:
    return " ".join(text.split())


def _lowered(text: str) -> str:
    """A sentence to follow a colon: its first letter small, unless an acronym begins it."""
    first = text.split(" ", 1)[0]
    return text if first.isupper() and len(first) > 1 else text[0].lower() + text[1:]
