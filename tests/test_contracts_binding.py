"""Which tests carry which falsifiers, found in the text of a suite, by pytest, and after a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders.contracts import ID, SUITE, make_repository

from apr_dist.contracts.binding import by_falsifier, read_tests
from apr_dist.contracts.collection import collect
from apr_dist.contracts.results import Outcome, read_results, together
from apr_dist.errors import UsageError

HEAD = "import pytest\n\n"


def suite_of(root: Path, text: str, **others: str) -> dict[str, tuple[tuple[str, ...], bool]]:
    """Node id to (ids, entry point) of a suite with one test file and some others."""
    for name, content in {"test_one": HEAD + text, **others}.items():
        path = root / "tests" / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    found = read_tests(root)
    return {
        node.removeprefix("tests/test_one.py::"): (test.ids, test.entry_point) for node, test in found.items()
    }


def test_markers_on_functions_classes_files_and_single_cases_are_found(tmp_path: Path) -> None:
    text = (
        'pytestmark = [pytest.mark.falsifies("F-FILE-001")]\n'
        'CASES = 3\n\n@pytest.mark.falsifies("F-A-001", "F-B-001")\ndef test_a(): ...\n\n'
        '@pytest.mark.falsifies("F-CLASS-001")\nclass TestB:\n    def test_b(self): ...\n'
        "    def helper(self): ...\n\n"
        '@pytest.mark.parametrize("x", [1, pytest.param(2, marks=pytest.mark.falsifies("F-CASE-001"))])\n'
        "def test_c(x): ...\n\nasync def test_d(): ...\n\ndef helper(): ...\n"
    )
    assert suite_of(tmp_path, text) == {
        "test_a": (("F-FILE-001", "F-A-001", "F-B-001"), False),
        "TestB::test_b": (("F-FILE-001", "F-CLASS-001"), False),
        "test_c": (("F-FILE-001", "F-CASE-001"), False),
        "test_d": (("F-FILE-001",), False),
    }
    assert {marker.case for marker in read_tests(tmp_path)["tests/test_one.py::test_c"].markers} == {
        False,
        True,
    }


@pytest.mark.parametrize(
    ("text", "through"),
    [
        ("def test_x():\n    from apr_dist.train import main\n    main([])\n", True),
        ("def test_x():\n    import apr_dist.cli\n    apr_dist.cli.main([])\n", True),
        ("from apr_dist import train\ndef test_x():\n    train.main([])\n", True),
        ("import subprocess\ndef test_x():\n    subprocess.run(['apr-dist', 'inspect'])\n", True),
        (
            "COMMAND = ['-m', 'apr_dist.train']\ndef run():\n    COMMAND\ndef test_x():\n    run()\n",
            True,
        ),
        ("from builders.door import run\ndef test_x():\n    run()\n", True),
        ("from builders.door import quiet\ndef test_x():\n    quiet()\n", False),
        ("def test_x(door):\n    assert door\n", True),
        ("from apr_dist.config import parse\ndef test_x():\n    parse('apr-dist stamp x.apr')\n", False),
    ],
)
def test_a_entry_point_is_seen_through_helpers_builders_fixtures_and_constants(
    tmp_path: Path, text: str, through: bool
) -> None:
    builder = (
        "def run():\n    from apr_dist.train import main\n    return main\n\ndef quiet():\n    return 1\n"
    )
    conftest = HEAD + "from builders.door import run\n\n@pytest.fixture\ndef door():\n    return run()\n"
    found = suite_of(tmp_path, text, conftest=conftest, builders__door=builder)
    assert found["test_x"] == ((), through)


def test_a_file_that_does_not_parse_holds_no_tests(tmp_path: Path) -> None:
    assert suite_of(tmp_path, "def test_x(:\n", test_two="def test_y(): ...\n") == {
        "tests/test_two.py::test_y": ((), False)
    }


def test_tests_are_found_by_falsifier(tmp_path: Path) -> None:
    make_repository(tmp_path)
    found = by_falsifier(read_tests(tmp_path))
    assert {name: [test.node for test in tests] for name, tests in found.items()} == {
        ID: ["tests/test_sum.py::test_two_and_two"]
    }


def test_pytest_collects_what_the_text_says_with_its_cases(tmp_path: Path) -> None:
    make_repository(tmp_path)
    cases = collect(tmp_path)
    assert cases == {"tests/test_sum.py::test_two_and_two": 1, "tests/test_sum.py::test_signs": 4}
    assert set(cases) == set(read_tests(tmp_path))


def test_a_suite_that_cannot_be_imported_is_a_usage_error(tmp_path: Path) -> None:
    make_repository(tmp_path, suite="import no_such_module_anywhere\n" + SUITE)
    with pytest.raises(UsageError, match="cannot collect"):
        collect(tmp_path)


CONFTEST = """\
import sys
from pathlib import Path

sys.path.insert(0, {builders!r})

from builders.contracts import register_recorder, tag_falsifiers


def pytest_configure(config):
    config.addinivalue_line("markers", "falsifier: bound")
    register_recorder(config, Path({root!r}))


def pytest_collection_modifyitems(items):
    tag_falsifiers(items)
"""


@pytest.mark.parametrize("workers", [(), ("-p", "xdist", "-n", "2")], ids=["one process", "two workers"])
def test_a_run_leaves_the_worst_result_of_each_bound_test(tmp_path: Path, workers: tuple[str, ...]) -> None:
    suite = SUITE.replace(
        '@pytest.mark.parametrize("cell", range(4))\ndef test_signs(cell):\n    assert cell < 4',
        f'@pytest.mark.falsifies("{ID}")\n@pytest.mark.parametrize("cell", range(4))\n'
        "def test_signs(cell):\n    assert cell != 2",
    )
    make_repository(tmp_path, suite=suite + "\n\ndef test_unbound():\n    assert False\n")
    conftest = CONFTEST.format(builders=str(Path(__file__).parent), root=str(tmp_path))
    (tmp_path / "tests" / "conftest.py").write_text(conftest, encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, "tests"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    results = read_results(tmp_path)
    assert {node: result.outcome for node, result in results.items()} == {
        "tests/test_sum.py::test_two_and_two": Outcome.PASSED,
        "tests/test_sum.py::test_signs": Outcome.FAILED,
    }
    assert len({result.code for result in results.values()}) == 1


def test_several_outcomes_make_one() -> None:
    assert together([Outcome.PASSED, Outcome.SKIPPED]) is Outcome.PASSED
    assert together([Outcome.SKIPPED]) is Outcome.SKIPPED
    assert together([Outcome.SKIPPED, Outcome.FAILED, Outcome.PASSED]) is Outcome.FAILED
