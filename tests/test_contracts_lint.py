"""Each gate of lint, with the example that makes it speak and no other gate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders.contracts import CONTRACT, ID, MUTANTS, SUITE, changed, make_repository

from apr_dist.atomic_files import file_digest
from apr_dist.contracts.evidence import RULES, sign, signature
from apr_dist.contracts.finding import Finding, Gate
from apr_dist.contracts.lint import LintReport, lint
from apr_dist.contracts.repository import read_repository
from apr_dist.contracts.results import Outcome, record_results

COLLECTED = {"tests/test_sum.py::test_two_and_two": 1, "tests/test_sum.py::test_signs": 4}
OTHER = CONTRACT.replace("sum-v1", "more-v1").replace("SUM", "MORE").replace("DT-SIGN", "DT-MORE")


def report(root: Path, **changes: Any) -> LintReport:
    """Lint the small repository after changes of its ``contract`` or ``suite``."""
    make_repository(root, **changes)
    return lint(read_repository(root), collected=COLLECTED)


def only(found: LintReport, gate: Gate) -> Finding:
    """The single finding, which must be of that gate."""
    assert [finding.gate for finding in found.findings] == [gate], [str(f) for f in found.findings]
    return found.findings[0]


def test_the_good_repository_passes_every_gate(tmp_path: Path) -> None:
    found = report(tmp_path)
    assert found.ok, [str(finding) for finding in found.findings]
    assert {outcome.gate for outcome in found.outcomes} == set(Gate)
    assert all(outcome.passed and outcome.says for outcome in found.outcomes)


def test_schema_a_file_without_its_shape(tmp_path: Path) -> None:
    found = report(tmp_path, contract=changed("  kind: pattern", "  kind: poem"))
    assert only(found, Gate.SCHEMA).line == 8


def test_unique_ids_an_id_in_two_files(tmp_path: Path) -> None:
    make_repository(tmp_path)
    (tmp_path / "contracts" / "more-v1.yaml").write_text(OTHER.replace("FALSIFY-MORE-001", ID), "utf-8")
    finding = only(lint(read_repository(tmp_path), collected=COLLECTED), Gate.UNIQUE_IDS)
    assert finding.text == f"id {ID} is already in contracts/more-v1.yaml"


@pytest.mark.parametrize(
    ("new", "says"),
    [
        ("  references: []\n", "no reference"),
        ("  references: [docs/gone.md]\n", "docs/gone.md does not exist"),
    ],
)
def test_references_none_or_one_that_is_gone(tmp_path: Path, new: str, says: str) -> None:
    found = report(tmp_path, contract=changed("  references:\n    - docs/sum.md\n", new))
    assert says in only(found, Gate.REFERENCES).text


def test_dependencies_a_contract_that_does_not_exist(tmp_path: Path) -> None:
    found = report(tmp_path, contract=changed("depends_on: []", "depends_on: [gone-v1]"))
    assert only(found, Gate.DEPENDENCIES).text == "there is no contract gone-v1"


def test_dependencies_a_circle(tmp_path: Path) -> None:
    make_repository(tmp_path, contract=changed("depends_on: []", "depends_on: [more-v1]"))
    other = OTHER.replace("depends_on: []", "depends_on: [sum-v1]").replace("test_sum.py", "test_more.py")
    (tmp_path / "contracts" / "more-v1.yaml").write_text(other, "utf-8")
    (tmp_path / "tests" / "test_more.py").write_text(SUITE.replace("SUM", "MORE"), "utf-8")
    (tmp_path / "tests" / "mutants" / "more.py").write_text(MUTANTS.replace("SUM", "MORE"), "utf-8")
    collected = COLLECTED | {node.replace("sum", "more"): cases for node, cases in COLLECTED.items()}
    found = lint(read_repository(tmp_path), collected=collected)
    assert {(f.gate, f.text) for f in found.findings} == {
        (Gate.DEPENDENCIES, "a circle: sum-v1 -> more-v1 -> sum-v1"),
        (Gate.DEPENDENCIES, "a circle: more-v1 -> sum-v1 -> more-v1"),
    }


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("  version: 1.1.0\n  status", "  version: 1.2.0\n  status", "newest changelog entry says 1.1.0"),
        ("    - version: 1.0.0", "    - version: 1.1.1", "1.1.1 stands after 1.1.0"),
        ("    - version: 1.0.0", "    - version: 1.1.0", "1.1.0 stands after 1.1.0"),
        ("    - version: 1.0.0", '    - version: "1.0"', "no semantic version"),
        ("      date: 2026-01-01", "      date: 2026-03-01", "later than the newer"),
        ("  updated: 2026-02-01", "  updated: 2026-02-02", "updated is 2026-02-02"),
        ("  created: 2026-01-01", "  created: 2026-02-02", "updated is 2026-02-01"),
    ],
)
def test_versions_that_do_not_grow_or_agree(tmp_path: Path, old: str, new: str, says: str) -> None:
    found = report(tmp_path, contract=changed(f"{old}", f"{new}"))
    assert says in only(found, Gate.VERSIONS).text


SECOND = """\
  - id: OBL-TWO
    type: safety
    property: Another.
    formal: {formal}
    applies_to: {applies}
falsification_tests:
"""


@pytest.mark.parametrize(
    ("formal", "applies", "named", "says"),
    [
        ("x", "sum", "[OBL-SUM]", "no falsifier bears on OBL-TWO"),
        ("x", "all", "[OBL-SUM, OBL-TWO, OBL-GONE]", "bears on OBL-GONE"),
        ("x", "product", "[OBL-SUM, OBL-TWO]", "applies to product, which is no equation"),
        ("s = a + b", "sum", "[OBL-SUM, OBL-TWO]", "says what another one says"),
    ],
)
def test_obligations_that_nothing_bears_on_or_that_repeat(
    tmp_path: Path, formal: str, applies: str, named: str, says: str
) -> None:
    text = changed("falsification_tests:\n", SECOND.format(formal=formal, applies=applies))
    text = changed("    obligations: [OBL-SUM]", f"    obligations: {named}", text)
    tested = 1 if named == "[OBL-SUM]" else 2
    text = changed("  total_obligations: 1\n  tested: 1", f"  total_obligations: 2\n  tested: {tested}", text)
    assert says in only(report(tmp_path, contract=text), Gate.OBLIGATIONS).text


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("bound: 4", "bound: 3", "bound is 3 and there are 4 cells"),
        ("{a: minus, b: minus, outcome: minus}", "{a: plus, b: plus, outcome: minus}", "given twice"),
        (
            "{a: minus, b: minus, outcome: minus}",
            "{a: minus, b: zero, outcome: minus}",
            "6 combinations exist",
        ),
        ("{a: minus, b: minus, outcome: minus}", "{a: minus, outcome: minus}", "the same keys"),
        ("obligation: OBL-SUM", "obligation: OBL-GONE", "decides OBL-GONE"),
    ],
)
def test_decision_tables_that_are_not_whole(tmp_path: Path, old: str, new: str, says: str) -> None:
    found = report(tmp_path, contract=changed(old, new))
    assert says in only(found, Gate.DECISION_TABLES).text


def test_test_exists_a_test_under_another_name(tmp_path: Path) -> None:
    text = changed(
        "    test: tests/test_sum.py::test_two_and_two", "    test: tests/test_sums.py::test_two_and_two"
    )
    finding = only(report(tmp_path, contract=text), Gate.TEST_EXISTS)
    assert "did you mean tests/test_sum.py::test_two_and_two?" in finding.text


@pytest.mark.parametrize(("cases", "says"), [(0, "does not collect"), (3, "3 cases for 4 cells")])
def test_test_collected_a_test_pytest_does_not_see_or_a_table_tried_in_part(
    tmp_path: Path, cases: int, says: str
) -> None:
    make_repository(tmp_path)
    collected = {node: n for node, n in (COLLECTED | {"tests/test_sum.py::test_signs": cases}).items() if n}
    found = lint(read_repository(tmp_path), collected=collected)
    assert says in only(found, Gate.TEST_COLLECTED).text


def test_test_marked_a_named_test_without_its_marker(tmp_path: Path) -> None:
    suite = changed("def test_signs(", "def test_unmarked():\n    assert 1\n\n\ndef test_signs(", SUITE)
    suite = suite.replace('@pytest.mark.parametrize("cell", range(4))\n', "")
    old = "test: tests/test_sum.py::test_two_and_two"
    text = changed(old, f"{old} && tests/test_sum.py::test_signs")
    finding = only(report(tmp_path, contract=text, suite=suite), Gate.TEST_MARKED)
    assert finding.text == f'tests/test_sum.py::test_signs does not carry @pytest.mark.falsifies("{ID}")'


@pytest.mark.parametrize(
    ("marker", "says"),
    [
        ('@pytest.mark.falsifies("FALSIFY-GONE-001")', "FALSIFY-GONE-001, which is in no contract"),
        ("@pytest.mark.falsifies(NAME)", "plain strings"),
    ],
)
def test_marker_known_a_marker_that_names_nothing(tmp_path: Path, marker: str, says: str) -> None:
    suite = changed("@pytest.mark.parametrize", f"{marker}\n@pytest.mark.parametrize", SUITE)
    finding = only(report(tmp_path, suite=suite), Gate.MARKER_KNOWN)
    assert says in finding.text
    assert finding.file == Path("tests/test_sum.py")


def test_marker_known_a_bound_test_that_its_contract_does_not_name(tmp_path: Path) -> None:
    text = changed("    test: tests/test_sum.py::test_two_and_two\n", "")
    text = text.replace("PARTIAL_ALGORITHM_LEVEL", "PROPOSED").replace("  tested: 1", "  tested: 0")
    finding = only(report(tmp_path, contract=text), Gate.MARKER_KNOWN)
    assert "bind it with `test: tests/test_sum.py::test_two_and_two`" in finding.text


@pytest.mark.parametrize(
    ("marker", "says"),
    [
        (f'@pytest.mark.falsifies("{ID}")\n@pytest.mark.falsifies("{ID}")', "bound by 2 markers"),
        (f'@pytest.mark.falsifies("{ID}", "{ID}")', "bound twice to one id"),
    ],
)
def test_bound_once_a_test_bound_twice(tmp_path: Path, marker: str, says: str) -> None:
    suite = changed(f'@pytest.mark.falsifies("{ID}")', marker, SUITE)
    assert says in only(report(tmp_path, suite=suite), Gate.BOUND_ONCE).text


def test_bound_once_a_test_that_hides_another_of_its_name(tmp_path: Path) -> None:
    suite = SUITE + f'\n\n@pytest.mark.falsifies("{ID}")\ndef test_two_and_two():\n    assert True\n'
    assert "the first one never runs" in only(report(tmp_path, suite=suite), Gate.BOUND_ONCE).text


FALSIFIER_STATUS = "    status: PARTIAL_ALGORITHM_LEVEL\n    rule"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (FALSIFIER_STATUS, "    status: FUNCTIONAL\n    rule", "what is bound shows PARTIAL_ALGORITHM_LEVEL"),
        (
            "  status: PARTIAL_ALGORITHM_LEVEL\n  created",
            "  status: FUNCTIONAL\n  created",
            "its falsifiers show at most PARTIAL_ALGORITHM_LEVEL",
        ),
    ],
)
def test_status_a_claim_above_what_is_shown(tmp_path: Path, old: str, new: str, says: str) -> None:
    text = changed(old, new)
    if "created" in new:
        text = text.replace("live: 0\n  status: PARTIAL_ALGORITHM_LEVEL", "live: 0\n  status: FUNCTIONAL")
    assert says in only(report(tmp_path, contract=text), Gate.STATUS).text


def test_status_a_test_under_a_falsifier_that_is_only_proposed(tmp_path: Path) -> None:
    text = changed(FALSIFIER_STATUS, "    status: PROPOSED\n    rule")
    text = text.replace("PARTIAL_ALGORITHM_LEVEL", "PROPOSED")
    assert "is called PROPOSED" in only(report(tmp_path, contract=text), Gate.STATUS).text


def test_status_a_failed_test_takes_the_entry_point_away(tmp_path: Path) -> None:
    text = CONTRACT.replace("PARTIAL_ALGORITHM_LEVEL", "FUNCTIONAL")
    suite = changed("    assert 2 + 2 == 4", "    from apr_dist.train import main\n\n    main([])", SUITE)
    make_repository(tmp_path, contract=text, suite=suite)
    assert lint(read_repository(tmp_path), collected=COLLECTED).ok
    record_results(tmp_path, {"tests/test_sum.py::test_two_and_two": (Outcome.FAILED, 0.1)})
    found = lint(read_repository(tmp_path), collected=COLLECTED)
    assert "claims FUNCTIONAL" in only(found, Gate.STATUS).text


LIVE = "contracts/evidence/sum/verdict.json"
PASSED: dict[str, Any] = {"synthetic": False, "gates": [{"id": ID, "passed": True}]}


def live_contract(path: str = LIVE) -> str:
    old = "test: tests/test_sum.py::test_two_and_two"
    text = changed(
        old, f"{old[:4]}: 'tests/test_sum.py::test_two_and_two && live: make live; evidence: {path}'"
    )
    text = changed(FALSIFIER_STATUS, "    status: DISCHARGED\n    rule", text)
    return changed("  live: 0", "  live: 1", text)


def keep(root: Path, verdict: object, path: str = LIVE) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    whole = sign(verdict) if isinstance(verdict, dict) else verdict
    (root / path).write_text(json.dumps(whole), encoding="utf-8")


def test_evidence_that_shows_the_falsifier_discharges_it(tmp_path: Path) -> None:
    keep(tmp_path, PASSED)
    assert report(tmp_path, contract=live_contract()).ok


@pytest.mark.parametrize(
    ("verdict", "says"),
    [
        (None, "does not exist"),
        ([], "has no list of gates"),
        ({"gates": []}, f"has no gate {ID}"),
        ({**PASSED, "synthetic": True}, "is of a synthetic run"),
        ({**PASSED, "rehearsal": True}, "is of a rehearsal"),
        ({**PASSED, "files": {"plot.png": "sha256:0"}}, "names plot.png, which is not beside it"),
        ({"gates": [{"id": ID, "passed": True}, {"id": ID, "passed": False}]}, "failed"),
    ],
)
def test_evidence_that_is_missing_or_shows_something_else(tmp_path: Path, verdict: object, says: str) -> None:
    if verdict is not None:
        keep(tmp_path, verdict)
    found = report(tmp_path, contract=live_contract())
    assert {finding.gate for finding in found.findings} == {Gate.EVIDENCE, Gate.STATUS}
    assert any(says in finding.text for finding in found.findings if finding.gate is Gate.EVIDENCE)


def edited(path: Path) -> None:
    verdict = json.loads(path.read_text("utf-8"))
    verdict["gates"].append({"id": "FALSIFY-SUM-009", "passed": True})
    path.write_text(json.dumps(verdict), "utf-8")


def judged_by_older_rules(path: Path) -> None:
    verdict = json.loads(path.read_text("utf-8")) | {"rules": RULES - 1}
    path.write_text(json.dumps(verdict | {"signature": signature(verdict)}), "utf-8")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (edited, "is not as it was signed"),
        (judged_by_older_rules, "make it again"),
        (lambda path: path.with_name("metrics.jsonl").write_text("{}\n"), "not the file that was judged"),
        (lambda path: path.with_name("more.json").write_text("{}"), "does not name more.json"),
    ],
)
def test_evidence_that_was_edited_or_is_stale(tmp_path: Path, harm: Callable[[Path], Any], says: str) -> None:
    path = tmp_path / LIVE
    path.parent.mkdir(parents=True)
    path.with_name("metrics.jsonl").write_text('{"step": 1}\n')
    keep(tmp_path, {**PASSED, "files": {"metrics.jsonl": file_digest(path.with_name("metrics.jsonl"))}})
    assert report(tmp_path, contract=live_contract()).ok
    harm(path)
    found = lint(read_repository(tmp_path), collected=COLLECTED)
    assert any(says in finding.text for finding in found.findings if finding.gate is Gate.EVIDENCE)


def test_evidence_that_nobody_claims_must_be_whole_and_its_blocking_gates_passed(tmp_path: Path) -> None:
    text = live_contract().replace("DISCHARGED", "PARTIAL_ALGORITHM_LEVEL").replace("live: 1", "live: 0")
    assert report(tmp_path, contract=text).ok, "no evidence yet"
    keep(tmp_path, {"gates": [{"id": ID, "passed": False}]})
    assert f"says {ID} failed" in only(report(tmp_path, contract=text), Gate.EVIDENCE).text
    advisory = text.replace("ship_blocking: true", "ship_blocking: false")
    assert report(tmp_path, contract=advisory).ok, "kept as not met"


def test_evidence_is_kept_in_one_place(tmp_path: Path) -> None:
    keep(tmp_path, PASSED, "docs/kept/verdict.json")
    found = report(tmp_path, contract=live_contract("docs/kept/verdict.json"))
    assert "kept under contracts/evidence/" in only(found, Gate.EVIDENCE).text


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("  total_obligations: 1", "  total_obligations: 2", "total_obligations is 2 and 1 by count"),
        ("  tested: 1", "  tested: 0", "tested is 0 and 1 by count"),
        ("  live: 0", "  live: 1", "live is 1 and 0 by count"),
        ("  live: 0\n  status: PARTIAL_ALGORITHM_LEVEL", "  live: 0\n  status: DRAFT", "status is DRAFT"),
    ],
)
def test_summary_counts_that_are_not_true(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert says in only(report(tmp_path, contract=changed(old, new)), Gate.SUMMARY).text


def test_source_ids_an_error_that_cites_what_no_contract_has(tmp_path: Path) -> None:
    make_repository(tmp_path)
    (tmp_path / "apr_dist" / "sums.py").write_text(
        '"""Sums."""\nWRONG = "FALSIFY-SUM-002"\n', encoding="utf-8"
    )
    finding = only(lint(read_repository(tmp_path), collected=COLLECTED), Gate.SOURCE_IDS)
    assert (finding.file, finding.line) == (Path("apr_dist/sums.py"), 2)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (MUTANTS.replace("Change(", "Other("), f"{ID} has no mutant"),
        (MUTANTS + 'MORE = (Change("FALSIFY-GONE-001", "", FILE, "", ""),)\n', "is of FALSIFY-GONE-001"),
    ],
)
def test_mutants_a_falsifier_without_one_and_one_without_a_falsifier(
    tmp_path: Path, table: str, says: str
) -> None:
    make_repository(tmp_path)
    (tmp_path / "tests" / "mutants" / "sums.py").write_text(table, "utf-8")
    finding = only(lint(read_repository(tmp_path), collected=COLLECTED), Gate.MUTANTS)
    assert says in finding.text
