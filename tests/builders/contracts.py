"""A small repository with one good contract to break, and the hooks that record falsifier results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from apr_dist.contracts.results import Outcome, record_results, together

ID = "FALSIFY-SUM-001"

CONTRACT = """\
metadata:
  id: sum-v1
  version: 1.1.0
  status: PARTIAL_ALGORITHM_LEVEL
  created: 2026-01-01
  updated: 2026-02-01
  author: someone
  kind: pattern
  references:
    - docs/sum.md
  depends_on: []
  description: Adding is right.
  changelog:
    - version: 1.1.0
      date: 2026-02-01
      change: a table
    - version: 1.0.0
      date: 2026-01-01
      change: first
equations:
  sum:
    formula: s = a + b
    domain: numbers
    codomain: numbers
    preconditions: []
    invariants: [a + b = b + a]
proof_obligations:
  - id: OBL-SUM
    type: soundness
    property: The sum is the sum.
    formal: s = a + b
    applies_to: sum
falsification_tests:
  - id: FALSIFY-SUM-001
    status: PARTIAL_ALGORITHM_LEVEL
    rule: The sum is right.
    prediction: 2 + 2 = 4
    test: tests/test_sum.py::test_two_and_two
    if_fails: Nothing adds up.
    ship_blocking: true
    obligations: [OBL-SUM]
    counter_example_classes: [off by one]
decision_tables:
  - id: DT-SIGN
    obligation: OBL-SUM
    property: the sign of a sum
    bound: 4
    test: tests/test_sum.py::test_signs
    cells:
      - {a: plus, b: plus, outcome: plus}
      - {a: plus, b: minus, outcome: either}
      - {a: minus, b: plus, outcome: either}
      - {a: minus, b: minus, outcome: minus}
verification_summary:
  total_obligations: 1
  tested: 1
  live: 0
  status: PARTIAL_ALGORITHM_LEVEL
"""

SUITE = """\
import pytest


@pytest.mark.falsifies("FALSIFY-SUM-001")
def test_two_and_two():
    assert 2 + 2 == 4


@pytest.mark.parametrize("cell", range(4))
def test_signs(cell):
    assert cell < 4
"""

MUTANTS = f'''\
PREFIX, FILE = "{ID[:-3]}", "apr_dist/sums.py"
MUTANTS = (Change(PREFIX + "{ID[-3:]}", "cites nothing", FILE, "WRONG", "RIGHT"),)
'''

PYTEST_INI = """\
[pytest]
markers =
    falsifies(id): bound to a falsifier
"""


def make_repository(root: Path, *, contract: str = CONTRACT, suite: str = SUITE) -> Path:
    """A checkout with one contract, its suite, its reference and a source file that cites its id."""
    files = {
        "contracts/sum-v1.yaml": contract,
        "tests/test_sum.py": suite,
        "docs/sum.md": "# Sum\n",
        "tests/mutants/sums.py": MUTANTS,
        "apr_dist/sums.py": f'WRONG = "{ID}"\n',
        "pytest.ini": PYTEST_INI,
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def changed(old: str, new: str, text: str = CONTRACT) -> str:
    """``text`` with its only ``old`` replaced; a change that changes nothing is a mistake in the test."""
    assert text.count(old) == 1, f"{text.count(old)} times: {old!r}"
    return text.replace(old, new)


def without_key(key: str, text: str = CONTRACT) -> str:
    """``text`` without the one-line entry ``key``."""
    found, count = re.subn(rf"(?m)^\s*{key}: [^\n]*\n", "", text)
    assert count == 1, f"{count} times: {key}"
    return found


def tag_falsifiers(items: list[pytest.Item]) -> None:
    """Mark every bound test, so that ``-m falsifier`` selects it, and let its reports carry its ids."""
    for item in items:
        ids = [str(name) for marker in item.iter_markers("falsifies") for name in marker.args]
        if ids:
            item.add_marker(pytest.mark.falsifier)
            item.user_properties.append(("falsifies", ids))


class FalsifierRecorder:
    """Writes the results of bound tests at the end of a session; with workers, on the controller."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen: dict[str, list[tuple[Outcome, float]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a phase of a bound test: its call, or what went wrong before or after it."""
        bound = any(name == "falsifies" for name, _ in report.user_properties)
        if bound and (report.when == "call" or not report.passed):
            # Several phases and several cases of one test make one result.
            node = report.nodeid.split("[", 1)[0]
            self._seen.setdefault(node, []).append((Outcome(report.outcome), report.duration))

    def pytest_sessionfinish(self) -> None:
        """Put what was seen over what earlier sessions recorded."""
        if self._seen:
            runs = {
                node: (together([outcome for outcome, _ in seen]), sum(seconds for _, seconds in seen))
                for node, seen in self._seen.items()
            }
            record_results(self._root, runs)


def register_recorder(config: pytest.Config, root: Path) -> None:
    """Record in this session, unless it is one worker of several."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(FalsifierRecorder(root), "falsifier-recorder")
