"""A copy of the package that a test may change, and its entry points."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from builders.runs import REPOSITORY


def copy_package(folder: Path) -> Path:
    """Copy ``apr_dist`` under ``folder``, built extension included; returns the folder."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "apr_dist", folder / "apr_dist", ignore=ignored)
    return folder


def put(package: Path, changes: Mapping[str, Mapping[str, str] | str]) -> int:
    """Make changes by file of the package, a whole text or old to new; returns the number of files."""
    for name, change in changes.items():
        path = package / "apr_dist" / name
        if isinstance(change, str):
            assert not path.exists(), f"{name} is there already"
            path.write_text(change, encoding="utf-8")
            continue
        text = path.read_text(encoding="utf-8")
        for old, new in change.items():
            assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {name}"
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")
    return len(changes)


def run(package: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the copy."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=package,
        env={**os.environ, "PYTHONPATH": str(package), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def apr_dist(package: Path, *words: str) -> str:
    """Run a verb of the copy, which must end well; what it printed."""
    done = run(package, "-m", "apr_dist", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(package: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run the copy's trainer."""
    return run(package, str(package / "apr_dist" / "train.py"), *flags)
