"""The documentation says what is so: its commands run, its generated parts exist, every id has an entry."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from builders.pages import PAGES, blocks, make_folder, run, unmarked_commands
from builders.runs import REPOSITORY, Inputs

from apr_dist.contracts.entries import CARRIED, PACKAGE
from apr_dist.contracts.fixes import FIXES
from apr_dist.contracts.refusals import judged, refusals
from apr_dist.contracts.repository import read_repository
from apr_dist.errors import ModelFileMissing

sys.path.insert(0, str(REPOSITORY / "docs" / "_ext"))
import page_parts
from stored_parts import STORED, names_in, refreshed

RUN = [page for page in PAGES if any(not block.not_run for block in blocks(page))]


def name(page: Path) -> str:
    """A page as its test is called."""
    return str(page.relative_to(REPOSITORY))


@pytest.mark.parametrize("page", RUN, ids=name)
def test_every_command_of_a_page_runs_in_order_or_says_why_not(
    page: Path, inputs: Inputs, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    folder = make_folder(tmp_path, inputs, shared, from_nothing=page.stem == "tutorial")
    for block in blocks(page):
        if not block.not_run:
            done = run(block, folder)
            assert done.returncode == block.exit_code, (
                f"{name(page)}:{block.line} ended with {done.returncode}:\n"
                f"{block.script}{done.stdout}{done.stderr}"
            )


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_command_stands_where_no_test_looks(page: Path) -> None:
    assert unmarked_commands(page) == []


@pytest.fixture(scope="module")
def gates_page() -> str:
    """The generated entries of the page about gates."""
    return page_parts.gates()


def test_every_falsifier_has_one_entry_with_a_cause_and_a_fix(gates_page: str) -> None:
    ids = [falsifier.id for _, _, falsifier in read_repository(REPOSITORY).falsifiers()]
    for identifier in ids:
        (entry,) = [part for part in gates_page.split("\n### ") if part.startswith(f"{identifier}\n")]
        assert "\nCause\n: " in entry
        assert "\nFix\n: " in entry


def test_an_entry_tells_what_the_code_says_and_its_exit_code(gates_page: str) -> None:
    entry = gates_page.split("### FALSIFY-APR-DIST-TRAINER-004\n")[1].split("\n### ", maxsplit=1)[0]
    assert "parameters are missing" in entry
    assert "import the model again from its source" in entry
    assert "4 (GATE)" in entry


def test_an_id_behind_a_constant_of_another_room_is_found() -> None:
    found = refusals(PACKAGE)
    assert any(one.kind == ModelFileMissing.__name__ for one in found["FALSIFY-APR-PRETRAIN-INIT-003"])
    known = {falsifier.id for _, _, falsifier in read_repository(REPOSITORY).falsifiers()}
    assert set(found) <= known


def test_every_gate_of_the_verdict_has_a_fix_and_no_fix_is_of_nothing() -> None:
    assert set(FIXES) == set(judged(PACKAGE)) - set(refusals(PACKAGE))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package alone, its links followed, as a wheel carries it."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(PACKAGE, folder / "apr_dist", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_the_command_an_error_ends_with_explains_it_without_a_checkout(
    installed: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}

    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "apr_dist", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    refused = ask("plan", "--init", "nowhere.apr", "--synthetic")
    assert refused.returncode == 3
    (pointer,) = re.findall(r"(?m)^see: apr-dist (.*)$", refused.stderr)
    explained = ask(*pointer.split())
    assert explained.returncode == 0
    assert explained.stdout.startswith("FALSIFY-APR-PRETRAIN-INIT-003\n")
    assert "\ncause " in explained.stdout
    assert "\nfix " in explained.stdout
    assert "3 (MODEL_FILE)" in explained.stdout
    listed = ask("explain").stdout
    ids = {falsifier.id for _, _, falsifier in read_repository(REPOSITORY).falsifiers()}
    assert {line.split()[0] for line in listed.splitlines()} == ids
    wrong = ask("explain", "FALSIFY-APR-PRETRAIN-INIT-03")
    assert wrong.returncode == 2
    (remedy,) = re.findall(r"apr-dist (explain \S+)\.", wrong.stderr)
    assert ask(*remedy.split()).returncode == 0


def test_an_installation_carries_every_contract() -> None:
    there = {path.name for path in (REPOSITORY / "contracts").glob("*.yaml")}
    assert {path.name for path in CARRIED.iterdir()} == there
    assert all(
        (CARRIED / name).read_bytes() == (REPOSITORY / "contracts" / name).read_bytes() for name in there
    )


def test_every_verb_has_its_help_in_the_reference() -> None:
    page = page_parts.command_line()
    for verb in page_parts.VERBS:
        assert f"\n## apr-dist {verb}\n" in page
        assert f"usage: apr-dist {verb}" in page


def test_every_stored_part_is_what_the_code_says_and_stands_in_one_page() -> None:
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    for page, text in texts.items():
        assert text == refreshed(text), f"{name(page)}: run python docs/_ext/stored_parts.py"
    assert sorted(part for text in texts.values() for part in names_in(text)) == sorted(STORED)


def test_a_stored_part_that_drifted_is_noticed() -> None:
    page = (REPOSITORY / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    drifted = page.replace("| 4 | GATE |", "| 5 | GATE |")
    assert drifted != page
    assert refreshed(drifted) == page
