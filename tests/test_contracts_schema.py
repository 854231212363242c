"""One contract file: what its schema refuses, and that each refusal knows its line."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
from builders.contracts import CONTRACT, changed, make_repository, without_key

from apr_dist.contracts.finding import Gate
from apr_dist.contracts.lint import lint, validate
from apr_dist.contracts.repository import find_root, read_repository
from apr_dist.contracts.schema import Kind, Level, Status, read_contract
from apr_dist.contracts.source import read_source
from apr_dist.errors import UsageError

FILE = Path("contracts/sum-v1.yaml")


def line_of(text: str, part: str) -> int:
    return text[: text.index(part)].count("\n") + 1


def test_a_good_file_is_read_whole() -> None:
    contract, findings = read_contract(CONTRACT, FILE)
    assert findings == ()
    assert contract is not None
    metadata = contract.body.metadata
    assert (metadata.id, metadata.kind, metadata.status) == (
        "sum-v1",
        Kind.PATTERN,
        Status("PARTIAL_ALGORITHM_LEVEL"),
    )
    assert metadata.updated == date(2026, 2, 1)
    falsifier = contract.falsifiers[0]
    assert falsifier.nodes == ("tests/test_sum.py::test_two_and_two",)
    assert falsifier.live == ()
    assert falsifier.status is Level.PARTIAL_ALGORITHM_LEVEL
    assert contract.source.line_of(("falsification_tests", 0, "rule")) == line_of(CONTRACT, "    rule:")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("  kind: pattern", "  kind: patern", "metadata.kind"),
        ("  created: 2026-01-01", "  created: soon", "metadata.created"),
        ("  id: sum-v1", "  id: Sum", "metadata.id"),
        ("    type: soundness", "    type: soundnes", "proof_obligations.0.type"),
        ("    ship_blocking: true", "    ship_blocking: maybe", "falsification_tests.0.ship_blocking"),
        ("    rule: The sum is right.", '    rule: "  "', "falsification_tests.0.rule"),
        ("    bound: 4", "    bound: 0", "decision_tables.0.bound"),
        ("  - id: FALSIFY-SUM-001", "  - id: falsify-1", "falsification_tests.0.id"),
        ("    obligations: [OBL-SUM]", "    obligations: []", "falsification_tests.0.obligations"),
        ("  tested: 1", "  tested: -1", "verification_summary.tested"),
    ],
)
def test_a_wrong_value_is_named_with_its_line(old: str, new: str, says: str) -> None:
    text = changed(f"{old}\n", f"{new}\n")
    contract, findings = read_contract(text, FILE)
    assert contract is None
    assert [finding.line for finding in findings] == [line_of(text, f"{new}\n")]
    assert findings[0].gate is Gate.SCHEMA
    assert findings[0].text.startswith(says)


def test_an_unknown_key_is_named_with_its_line_and_the_nearest_one() -> None:
    text = changed("    prediction:", "    predicton:")
    _, findings = read_contract(text, FILE)
    unknown = next(finding for finding in findings if "predicton" in finding.text)
    assert unknown.line == line_of(text, "    predicton:")
    assert unknown.text.endswith("did you mean prediction?")


@pytest.mark.parametrize("key", ["  version", "  author", "    formula", "    if_fails", "    applies_to"])
def test_a_missing_key_is_named(key: str) -> None:
    text = CONTRACT.replace("- version", "- _", 2) if key == "  version" else CONTRACT
    text = without_key(key, text).replace("- _", "- version")
    contract, findings = read_contract(text, FILE)
    assert contract is None
    assert [f.text.split(".")[-1] for f in findings] == [f"{key.strip()} is missing"]


def test_a_key_given_twice_is_an_error_and_names_both_lines() -> None:
    text = changed("    if_fails:", "    rule: Another.\n    if_fails:")
    _, findings = read_contract(text, FILE)
    assert len(findings) == 1
    assert findings[0].line == line_of(text, "    rule: Another.")
    assert f"first on line {line_of(text, '    rule: The')}" in findings[0].text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("a: [1", "not YAML"),
        ("a: &x 1\nb: *x\n", "an alias"),
        ("? [1, 2]\n: 3\n", "a key that is not plain text"),
        ("a: !!python/object:os.system x\n", "cannot be read"),
        ("- 1\n", "the file"),
    ],
)
def test_text_that_is_not_strict_yaml_is_refused(text: str, says: str) -> None:
    contract, findings = read_contract(text, FILE)
    assert contract is None
    assert any(says in finding.text for finding in findings)


def test_lines_are_those_of_keys_and_of_the_nearest_thing_around() -> None:
    source = read_source("a:\n  b: 1\n\n  c:\n    - x\n    - y\n")
    assert source.value == {"a": {"b": 1, "c": ["x", "y"]}}
    assert [source.line_of(path) for path in (("a", "b"), ("a", "c"), ("a", "c", 1), ("a", "none"))] == [
        2,
        4,
        6,
        1,
    ]


def test_a_file_is_named_after_its_contract() -> None:
    _, findings = read_contract(CONTRACT, Path("contracts/other-v1.yaml"))
    assert [finding.text for finding in findings] == ["metadata.id is sum-v1 and the file is other-v1.yaml"]


@pytest.mark.parametrize(
    ("test", "good"),
    [
        ("tests/test_sum.py::test_two_and_two", True),
        ("tests/test_sum.py::TestSum::test_two && tests/test_sum.py::test_three", True),
        ("'live: make live; evidence: contracts/evidence/x/verdict.json'", True),
        ("test_two_and_two", False),
        ("tests/test_sum.py::test_two[1]", False),
        ("'live: make live'", False),
    ],
)
def test_a_test_entry_is_node_ids_and_live_parts(test: str, good: bool) -> None:
    text = changed("test: tests/test_sum.py::test_two_and_two", f"test: {test}")
    _, findings = read_contract(text, FILE)
    assert (findings == ()) is good


def test_a_live_part_is_a_command_and_the_file_its_outcome_is_kept_in() -> None:
    live = "live: make live; evidence: contracts/evidence/x/verdict.json"
    text = changed("test: tests/test_sum.py::test_two_and_two", f"test: 'tests/test_a.py::test_b && {live}'")
    contract, _ = read_contract(text, FILE)
    assert contract is not None
    falsifier = contract.falsifiers[0]
    assert falsifier.nodes == ("tests/test_a.py::test_b",)
    assert [(part.command, part.evidence) for part in falsifier.live] == [
        ("make live", Path("contracts/evidence/x/verdict.json"))
    ]


def test_validate_reads_every_file_of_a_checkout(tmp_path: Path) -> None:
    root = make_repository(tmp_path)
    assert validate(root) == ()
    (root / "contracts" / "broken-v1.yaml").write_text("metadata: 3\n", encoding="utf-8")
    findings = validate(root)
    assert {str(finding.file) for finding in findings} == {"contracts/broken-v1.yaml"}
    assert str(findings[0]).startswith("contracts/broken-v1.yaml:1: [schema] ")


def test_other_gates_are_not_asked_about_a_file_that_has_no_shape(tmp_path: Path) -> None:
    root = make_repository(tmp_path, contract="metadata: 3\n")
    report = lint(read_repository(root), collected={})
    assert not report.ok
    assert {outcome.gate for outcome in report.outcomes if outcome.skipped is None} == {Gate.SCHEMA}


def test_the_checkout_is_found_from_below_and_its_absence_is_a_usage_error(tmp_path: Path) -> None:
    root = make_repository(tmp_path / "checkout")
    assert find_root(root / "apr_dist") == root
    with pytest.raises(UsageError, match=r"no contracts/\*\.yaml"):
        find_root(tmp_path)


def test_a_file_that_is_no_text_is_a_usage_error(tmp_path: Path) -> None:
    root = make_repository(tmp_path)
    (root / "contracts" / "binary-v1.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="binary-v1"):
        validate(root)
