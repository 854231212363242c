"""What an installation brings, and the files that make one. Building and using a wheel is ``make wheel``."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import distribution, entry_points
from pathlib import Path

import pytest
import yaml
from yamllint import linter
from yamllint.config import YamlLintConfig

import apr_dist

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
CRATE = tomllib.loads((REPOSITORY / "rust_loader" / "Cargo.toml").read_text())
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
YAML_FILES = sorted(
    path
    for place in (".github/workflows", "configs", "launch")
    for path in (REPOSITORY / place).glob("*.y*ml")
)


def test_package_and_crate_have_one_version() -> None:
    assert apr_dist.__version__ == CRATE["package"]["version"]


def test_the_oldest_python_is_the_same_for_package_and_extension() -> None:
    assert PROJECT["project"]["requires-python"] == ">=3.11"
    assert "abi3-py311" in CRATE["dependencies"]["pyo3"]["features"]


def test_the_package_is_typed_and_its_command_is_on_the_path() -> None:
    assert (Path(apr_dist.__file__).parent / "py.typed").is_file()
    (command,) = [one for one in entry_points(group="console_scripts") if one.name == "apr-dist"]
    assert command.load() is __import__("apr_dist.cli", fromlist=["main"]).main


def test_python_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "apr_dist", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"apr-dist {apr_dist.__version__}\n"


def test_every_extra_is_there_and_what_training_needs_is_no_extra() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    brought = {"bitsandbytes", "gguf", "liger", "parquet", "report", "track", "zstd"}
    assert brought | {"docs", "dev"} <= set(extras)
    needed = " ".join(PROJECT["project"]["dependencies"])
    for name in ("torch", "accelerate", "deepspeed", "safetensors", "tokenizers", "numpy"):
        assert name in needed


def test_the_licence_is_apache_and_the_installed_metadata_says_so() -> None:
    text = (REPOSITORY / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert distribution("apr-dist").metadata["License-Expression"] == "Apache-2.0"


def test_the_changelog_begins_with_what_is_not_released_yet_or_with_this_version() -> None:
    headings = [
        line[3:] for line in (REPOSITORY / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")
    ]
    assert headings[0] == "Unreleased" or headings[0].startswith(apr_dist.__version__)


def test_a_version_that_is_tested_with_is_one_that_is_allowed() -> None:
    from packaging.requirements import Requirement  # noqa: PLC0415

    pinned = {}
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            one = Requirement(line)
            pinned[one.name.lower()] = next(iter(one.specifier)).version
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    for text in (text for group in groups for text in group):
        wanted = Requirement(text)
        if wanted.name.lower() in pinned:
            assert wanted.specifier.contains(pinned[wanted.name.lower()]), text


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_every_yaml_file_is_well_formed(path: Path) -> None:
    rules = YamlLintConfig((REPOSITORY / ".yamllint.yaml").read_text())
    assert [str(problem) for problem in linter.run(path.read_text(), rules)] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_a_limit_and_only_the_rights_it_needs(path: Path) -> None:
    flow = yaml.safe_load(path.read_text())
    assert flow["permissions"] == {"contents": "read"}
    for name, job in flow["jobs"].items():
        assert job["timeout-minutes"] <= 60, name
        assert all("uses" in step or "run" in step for step in job["steps"])


def test_a_workflow_calls_only_targets_that_the_makefile_has() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    steps = [
        step.get("run", "")
        for path in WORKFLOWS
        for job in yaml.safe_load(path.read_text())["jobs"].values()
        for step in job["steps"]
    ]
    targets = [run.split()[1] for run in steps if run.startswith("make ")]
    assert {"check", "test", "docs", "wheel"} == set(targets)
    for target in targets:
        assert f"\n{target}: " in makefile
