"""What a contract file may say: its parts as frozen dataclasses, and reading one with line numbers.

Here is the shape of one file. What holds between files, and between a file and the tests, is in
``lint``; what a status may claim is in ``ladder``.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import field
from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from apr_dist.contracts.finding import Finding, Gate
from apr_dist.contracts.source import Source, ValuePath, read_source

_CONFIG = ConfigDict(extra="forbid")
Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
FalsifierId = Annotated[str, Field(pattern=r"^(FALSIFY|INV|GATE)(-[A-Z0-9]+)+-\d{3}$")]
ContractId = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*-v\d+$")]

_LIVE = re.compile(r"live: (?P<command>\S.*\S); evidence: (?P<path>\S+)")
_NODE = re.compile(r"tests/[\w/]+\.py(::\w+)+")


class Status(StrEnum):
    """How much is shown of a contract; the order and the rules are in ``ladder``."""

    PROPOSED = "PROPOSED"
    DRAFT = "DRAFT"
    PARTIAL_ALGORITHM_LEVEL = "PARTIAL_ALGORITHM_LEVEL"
    DRAFT_PARTIAL_DISCHARGE = "DRAFT_PARTIAL_DISCHARGE"
    FUNCTIONAL = "FUNCTIONAL"
    ACTIVE_RUNTIME = "ACTIVE_RUNTIME"
    DISCHARGED = "DISCHARGED"


class Level(StrEnum):
    """How much is shown of one falsifier."""

    PROPOSED = "PROPOSED"
    PARTIAL_ALGORITHM_LEVEL = "PARTIAL_ALGORITHM_LEVEL"
    FUNCTIONAL = "FUNCTIONAL"
    DISCHARGED = "DISCHARGED"


class Kind(StrEnum):
    """What a contract is about (the published kinds that exist here)."""

    TRAINING_LOOP = "training-loop"
    PRECONDITION_GATE = "training-precondition-gate"
    MODEL_FAMILY = "model-family"
    TOKENIZER = "tokenizer"
    CORPUS_ASSEMBLY = "corpus-assembly"
    PATTERN = "pattern"
    SCHEMA = "schema"


ObligationType = Literal["invariant", "soundness", "termination", "liveness", "safety"]
"""What kind of property an obligation states."""


@dataclass(frozen=True, config=_CONFIG)
class Change:
    """One entry of a changelog."""

    version: Text
    date: date
    change: Text


@dataclass(frozen=True, config=_CONFIG, kw_only=True)
class Metadata:
    """Who a contract is, and where it stands."""

    id: ContractId
    version: Text
    status: Status
    created: date
    updated: date
    author: Text
    kind: Kind
    references: tuple[Text, ...]
    depends_on: tuple[ContractId, ...]
    description: Text
    changelog: tuple[Change, ...] = Field(min_length=1)


@dataclass(frozen=True, config=_CONFIG, kw_only=True)
class Equation:
    """A formula that the code computes, with its domain and what holds of it."""

    formula: Text
    domain: Text
    codomain: Text
    preconditions: tuple[Text, ...]
    invariants: tuple[Text, ...]


@dataclass(frozen=True, config=_CONFIG, kw_only=True)
class Obligation:
    """A property that must hold; falsifiers name it by its id."""

    id: Text
    type: ObligationType
    property: Text
    formal: Text
    applies_to: Text


@dataclass(frozen=True, config=_CONFIG, kw_only=True)
class Falsifier:
    """An experiment that would show a promise broken.

    Attributes:
        id: its name, unique over all files.
        status: how much of it is claimed to be shown.
        rule: what must hold, in one sentence.
        prediction: what is observed while it holds.
        test: pytest node ids and ``live:`` parts, joined by `` && ``; absent while PROPOSED.
        if_fails: what it means when the prediction is not met.
        ship_blocking: whether a failure stops a release.
        obligations: ids of the obligations it bears on.
        counter_example_classes: the ways of breaking it that are tried.
    """

    id: FalsifierId
    status: Level
    rule: Text
    prediction: Text
    if_fails: Text
    ship_blocking: bool
    obligations: tuple[Text, ...] = Field(min_length=1)
    counter_example_classes: tuple[Text, ...] = Field(min_length=1)
    test: str | None = None

    @property
    def nodes(self) -> tuple[str, ...]:
        """The pytest node ids it names."""
        return tuple(part for part in self._parts if not part.startswith("live:"))

    @property
    def live(self) -> tuple[Live, ...]:
        """The commands it names whose outcome is kept as evidence."""
        found = (_LIVE.fullmatch(part) for part in self._parts)
        return tuple(Live(match["command"], Path(match["path"])) for match in found if match)

    @property
    def _parts(self) -> tuple[str, ...]:
        return tuple(part.strip() for part in (self.test or "").split(" && ") if part.strip())


@dataclasses.dataclass(frozen=True)
class Live:
    """A command that is run on real hardware, and the file its outcome is kept in."""

    command: str
    evidence: Path


@dataclass(frozen=True, config=_CONFIG, kw_only=True)
class DecisionTable:
    """A small table whose every cell is tried.

    Attributes:
        id: its name, unique over all files.
        obligation: the obligation it decides.
        property: what a cell says.
        bound: how many cells there are.
        test: node id of the test that tries each of them.
        cells: the cells; each gives the same keys, of which ``outcome`` is the answer.
    """

    id: Text
    obligation: Text
    property: Text
    bound: int = Field(gt=0)
    test: Text
    cells: tuple[dict[str, Any], ...]


@dataclass(frozen=True, config=_CONFIG, kw_only=True)
class Summary:
    """The counts a file gives of itself; ``lint`` recounts them."""

    total_obligations: int = Field(ge=0)
    tested: int = Field(ge=0)
    live: int = Field(ge=0)
    status: Status


@dataclass(frozen=True, config=_CONFIG, kw_only=True)
class Body:
    """A contract file from top to bottom."""

    metadata: Metadata
    equations: dict[str, Equation] = Field(min_length=1)
    proof_obligations: tuple[Obligation, ...] = Field(min_length=1)
    falsification_tests: tuple[Falsifier, ...] = Field(min_length=1)
    verification_summary: Summary
    decision_tables: tuple[DecisionTable, ...] = field(default=())


@dataclasses.dataclass(frozen=True)
class Contract:
    """One file that follows the schema, and the line of everything in it."""

    file: Path
    body: Body
    source: Source

    @property
    def id(self) -> str:
        """The contract's name."""
        return self.body.metadata.id

    @property
    def falsifiers(self) -> tuple[Falsifier, ...]:
        """Its falsifiers, in the order of the file."""
        return self.body.falsification_tests

    def finding(self, gate: Gate, text: str, *where: str | int) -> Finding:
        """A finding at the value that ``where`` leads to."""
        return Finding(self.file, self.source.line_of(where), gate, text)


_BODY = TypeAdapter(Body)


def read_contract(text: str, file: Path) -> tuple[Contract | None, tuple[Finding, ...]]:
    """Parse and check one file.

    Args:
        text: its content.
        file: its path relative to the repository, for findings and for the name it must carry.

    Returns:
        The contract (None when it does not follow the schema) and every finding, in line order.
    """
    source = read_source(text)
    findings = [Finding(file, problem.line, Gate.SCHEMA, problem.text) for problem in source.problems]
    if source.value is None:
        return None, tuple(findings)
    try:
        body = _BODY.validate_python(source.value)
    except ValidationError as error:
        # A list whose items are wrong is also told to be short of right ones; the items say enough.
        problems = [p for p in error.errors(include_url=False) if p["type"] != "too_short" or not p["input"]]
        findings += [_schema_finding(dict(problem), source, file) for problem in problems]
        return None, tuple(sorted(findings))
    contract = Contract(file, body, source)
    findings += _form(contract)
    return contract, tuple(sorted(findings))


def _schema_finding(problem: Mapping[str, Any], source: Source, file: Path) -> Finding:
    path: ValuePath = tuple(problem["loc"])
    shown = ".".join(str(part) for part in path) or "the file"
    text = f"{shown}: {problem['msg']}"
    if problem["type"] in {"missing", "missing_argument", "missing_keyword_only_argument"}:
        text = f"{shown} is missing"
    elif problem["type"] in {"unexpected_keyword_argument", "extra_forbidden"}:
        close = difflib.get_close_matches(str(path[-1]), _KEYS, n=1)
        text = f"{shown} is no key of a contract" + (f"; did you mean {close[0]}?" if close else "")
    return Finding(file, source.line_of(path), Gate.SCHEMA, text)


_PARTS: tuple[type, ...] = (
    Body, Metadata, Change, Equation, Obligation, Falsifier, DecisionTable, Summary,
)  # fmt: skip
_KEYS = sorted({item.name for part in _PARTS for item in dataclasses.fields(part)})


def _form(contract: Contract) -> list[Finding]:
    """What a type cannot say about one file alone."""
    findings = []
    if contract.file.stem != contract.id:
        text = f"metadata.id is {contract.id} and the file is {contract.file.name}"
        findings.append(contract.finding(Gate.SCHEMA, text, "metadata", "id"))
    for index, falsifier in enumerate(contract.falsifiers):
        for part in falsifier._parts:
            if not (_NODE.fullmatch(part) or _LIVE.fullmatch(part)):
                text = (
                    f"{falsifier.id}: {part!r} is neither a pytest node id (tests/test_x.py::test_y)"
                    " nor `live: COMMAND; evidence: PATH`"
                )
                findings.append(contract.finding(Gate.SCHEMA, text, "falsification_tests", index, "test"))
    return findings
