"""Where a promise stands: the ladder, the table, the story of one id, and the scoreboard."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from builders.contracts import CONTRACT, ID, SUITE, changed, make_repository

from apr_dist.contracts.binding import read_tests
from apr_dist.contracts.evidence import package_digest, sign
from apr_dist.contracts.ladder import supported_level, supported_statuses
from apr_dist.contracts.overview import ProofKind, contract_rows, explain, status_rows
from apr_dist.contracts.repository import read_repository
from apr_dist.contracts.results import (
    MUTANTS_FILE,
    RESULTS_FILE,
    LastResult,
    Mutant,
    Outcome,
    code_digest,
    read_mutants,
    read_results,
    record_mutants,
    record_results,
)
from apr_dist.contracts.schema import Falsifier, Level, Status, read_contract
from apr_dist.contracts.scoreboard import html_page, markdown, totals
from apr_dist.errors import UsageError

NODE = "tests/test_sum.py::test_two_and_two"
LIVE = "live: make live; evidence: contracts/evidence/sum/verdict.json"


def falsifiers(*levels: str, live: bool = False, advisory: tuple[int, ...] = ()) -> list[Falsifier]:
    """Falsifiers that claim these levels; the last one is live if asked."""
    made = []
    for index, level in enumerate(levels):
        test = LIVE if live and index == len(levels) - 1 else NODE
        made.append(
            Falsifier(
                id=f"FALSIFY-X-{index:03}",
                status=Level(level),
                rule="r",
                prediction="p",
                if_fails="f",
                ship_blocking=index not in advisory,
                obligations=("O",),
                counter_example_classes=("c",),
                test=test,
            )
        )
    return made


@pytest.mark.parametrize(
    ("levels", "live", "best"),
    [
        (("PROPOSED", "PROPOSED"), False, Status.PROPOSED),
        (("PROPOSED", "FUNCTIONAL"), False, Status.DRAFT),
        (("PROPOSED", "DISCHARGED"), True, Status.DRAFT_PARTIAL_DISCHARGE),
        (("PARTIAL_ALGORITHM_LEVEL", "FUNCTIONAL"), False, Status.PARTIAL_ALGORITHM_LEVEL),
        (("FUNCTIONAL", "FUNCTIONAL"), False, Status.ACTIVE_RUNTIME),
        (("FUNCTIONAL", "DISCHARGED"), True, Status.DISCHARGED),
        (("PARTIAL_ALGORITHM_LEVEL", "DISCHARGED"), True, Status.PARTIAL_ALGORITHM_LEVEL),
    ],
)
def test_a_contract_is_as_good_as_its_falsifiers(levels: tuple[str, ...], live: bool, best: Status) -> None:
    assert supported_statuses(falsifiers(*levels, live=live))[-1] is best


def test_an_advisory_falsifier_does_not_hold_a_contract_back() -> None:
    made = falsifiers("FUNCTIONAL", "PROPOSED", advisory=(1,))
    assert Status.FUNCTIONAL in supported_statuses(made)
    assert Status.FUNCTIONAL not in supported_statuses(falsifiers("FUNCTIONAL", "PROPOSED"))


def test_a_level_follows_from_tests_results_and_evidence(tmp_path: Path) -> None:
    door = SUITE.replace("    assert 2 + 2 == 4", "    from apr_dist.train import main\n\n    main([])")
    unit = read_tests(make_repository(tmp_path / "unit"))[NODE]
    through = read_tests(make_repository(tmp_path / "door", suite=door))[NODE]
    plain, live = falsifiers("PROPOSED"), falsifiers("PROPOSED", live=True)
    assert supported_level(plain[0], [], {}, tmp_path) is Level.PROPOSED
    assert supported_level(plain[0], [unit], {}, tmp_path) is Level.PARTIAL_ALGORITHM_LEVEL
    assert supported_level(plain[0], [unit, through], {}, tmp_path) is Level.FUNCTIONAL
    assert supported_level(live[0], [], {}, tmp_path) is Level.PROPOSED
    verdict = tmp_path / "contracts" / "evidence" / "sum" / "verdict.json"
    verdict.parent.mkdir(parents=True)
    verdict.write_text(json.dumps(sign({"gates": [{"id": live[0].id, "passed": True}]})), encoding="utf-8")
    assert supported_level(live[0], [], {}, tmp_path) is Level.DISCHARGED
    failed = {NODE: LastResult(Outcome.FAILED, 0.1, "now", "code")}
    assert supported_level(live[0], [unit], failed, tmp_path) is Level.PARTIAL_ALGORITHM_LEVEL


@pytest.mark.parametrize(
    ("changed_since", "says"), [(False, "not run"), (True, "not run, evidence of other code")]
)
def test_evidence_of_other_code_is_shown_as_such(tmp_path: Path, changed_since: bool, says: str) -> None:
    text = changed(f"    test: {NODE}", f"    test: '{NODE} && {LIVE}'")
    make_repository(tmp_path, contract=text)
    verdict = tmp_path / "contracts" / "evidence" / "sum" / "verdict.json"
    verdict.parent.mkdir(parents=True)
    signed = {"code_digest": package_digest(tmp_path / "apr_dist")}
    body = {"gates": [{"id": ID, "passed": True}], "signed": signed}
    verdict.write_text(json.dumps(sign(body)), encoding="utf-8")
    if changed_since:
        (tmp_path / "apr_dist" / "sums.py").write_text("changed = 1\n", encoding="utf-8")
    repository = read_repository(tmp_path)
    row = status_rows(repository)[0]
    assert (row.kind, row.shown, row.last_result) == (ProofKind.LIVE, Level.DISCHARGED, says)
    story = "\n".join(explain(repository, ID))
    assert ("shows it, evidence of other code" in story) == changed_since


def test_a_row_says_what_stands_behind_a_falsifier_and_how_it_ended(tmp_path: Path) -> None:
    make_repository(tmp_path)
    row = status_rows(read_repository(tmp_path))[0]
    assert (row.id, row.contract, row.meaning) == (ID, "sum-v1", "The sum is right.")
    assert (row.kind, row.tests, row.last_result) == (ProofKind.UNIT, (NODE,), "not run")
    assert (row.claimed, row.shown) == (Level.PARTIAL_ALGORITHM_LEVEL, Level.PARTIAL_ALGORITHM_LEVEL)
    record_results(tmp_path, {NODE: (Outcome.PASSED, 0.25)})
    assert status_rows(read_repository(tmp_path))[0].last_result == "passed"
    (tmp_path / "apr_dist" / "sums.py").write_text("changed = 1\n", encoding="utf-8")
    assert status_rows(read_repository(tmp_path))[0].last_result == "passed, older code"


def test_a_falsifier_of_several_tests_has_not_passed_while_one_was_not_run(tmp_path: Path) -> None:
    suite = SUITE.replace(
        "@pytest.mark.parametrize", f'@pytest.mark.falsifies("{ID}")\n@pytest.mark.parametrize'
    )
    make_repository(tmp_path, suite=suite)
    record_results(tmp_path, {NODE: (Outcome.PASSED, 0.25)})
    assert status_rows(read_repository(tmp_path))[0].last_result == "1 of 2 passed, the rest not run"
    record_results(tmp_path, {"tests/test_sum.py::test_signs": (Outcome.FAILED, 0.25)})
    assert status_rows(read_repository(tmp_path))[0].last_result == "failed"


def test_contracts_are_counted(tmp_path: Path) -> None:
    make_repository(tmp_path)
    row = contract_rows(read_repository(tmp_path))[0]
    assert (row.id, row.version, row.bound, row.falsifiers) == ("sum-v1", "1.1.0", 1, 1)
    assert row.status is row.shown is Status.PARTIAL_ALGORITHM_LEVEL


def test_explain_tells_what_is_pinned_why_by_what_and_how_it_broke(tmp_path: Path) -> None:
    make_repository(tmp_path)
    record_mutants(tmp_path, [Mutant(ID, "adds one", "apr_dist/sums.py", killed=True, red=(NODE,))])
    text = "\n".join(explain(read_repository(tmp_path), ID))
    for part in (
        "contracts/sum-v1.yaml:34, sum-v1 1.1.0",
        "rule          The sum is right.",
        "why           OBL-SUM (soundness): The sum is the sum.",
        "if it fails   Nothing adds up.",
        "tried         off by one",
        "test          tests/test_sum.py:5 test_two_and_two (unit)",
        "broken        apr_dist/sums.py: adds one; turned red: test_two_and_two",
        "in the code   apr_dist/sums.py:1",
    ):
        assert part in text


def test_explain_of_an_unknown_id_names_the_nearest(tmp_path: Path) -> None:
    make_repository(tmp_path)
    with pytest.raises(UsageError, match=f"use {ID}"):
        explain(read_repository(tmp_path), "FALSIFY-SUM-010")


def test_results_of_one_run_go_over_those_of_another_and_damage_is_no_result(tmp_path: Path) -> None:
    make_repository(tmp_path)
    record_results(tmp_path, {"a": (Outcome.PASSED, 1.0), "b": (Outcome.FAILED, 2.0)})
    record_results(tmp_path, {"b": (Outcome.PASSED, 3.0)})
    results = read_results(tmp_path)
    assert {node: (r.outcome, r.duration_s) for node, r in results.items()} == {
        "a": (Outcome.PASSED, 1.0),
        "b": (Outcome.PASSED, 3.0),
    }
    assert {result.code for result in results.values()} == {code_digest(tmp_path)}
    for damage in ("{", "[]", '{"tests": {"a": {"outcome": "maybe"}}}'):
        (tmp_path / RESULTS_FILE).write_text(damage, encoding="utf-8")
        assert read_results(tmp_path) == {}


def test_mutants_are_kept_by_what_they_change(tmp_path: Path) -> None:
    one, other = Mutant(ID, "one", "f.py", True, (NODE,)), Mutant(ID, "other", "f.py", False, ())
    record_mutants(tmp_path, [one])
    record_mutants(tmp_path, [other])
    assert read_mutants(tmp_path) == (one, other)
    record_mutants(tmp_path, [Mutant(ID, "one", "f.py", False, ())])
    assert [mutant.killed for mutant in read_mutants(tmp_path)] == [False, False]
    (tmp_path / MUTANTS_FILE).write_text('{"mutants": [{}]}', encoding="utf-8")
    assert read_mutants(tmp_path) == ()


class Page(HTMLParser):
    """Collects the text of a page, and everything it would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [
            f"{tag} {key}={value}" for key, value in attrs if key == "src" or tag in {"link", "script"}
        ]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_scoreboard_shows_every_falsifier_and_loads_nothing(tmp_path: Path) -> None:
    text = changed("    rule: The sum is right.", "    rule: a < b | c & <b>d</b>")
    make_repository(tmp_path, contract=text)
    record_results(tmp_path, {NODE: (Outcome.PASSED, 0.25)})
    record_mutants(tmp_path, [Mutant(ID, "adds one", "apr_dist/sums.py", killed=True, red=(NODE,))])
    repository = read_repository(tmp_path)
    contracts, rows = contract_rows(repository), status_rows(repository)
    page = Page()
    page.feed(html_page(contracts, rows))
    assert page.loads == []
    assert "a < b | c & <b>d</b>" in page.text
    shown = markdown(contracts, rows)
    line = next(line for line in shown.splitlines() if line.startswith(f"| {ID}"))
    assert "a < b \\| c" in line
    for part in ("unit", "`test_sum.py::test_two_and_two`", "passed", "1 of 1", "PARTIAL_ALGORITHM_LEVEL"):
        assert part in line
    assert (
        totals(rows) == "1 falsifiers: 1 PARTIAL_ALGORITHM_LEVEL; 1 with a mutant that turned their test red"
    )


def test_the_small_contract_is_the_one_these_tests_speak_of() -> None:
    contract, _ = read_contract(CONTRACT, Path("contracts/sum-v1.yaml"))
    assert contract is not None
    assert [falsifier.nodes for falsifier in contract.falsifiers] == [(NODE,)]
