"""What pytest really collects: one run of ``pytest --collect-only`` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from apr_dist.errors import UsageError

_COMMAND = ("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--color=no")


def collect(root: Path, *, timeout_s: float = 600.0) -> dict[str, int]:
    """Collect the suite of the repository at ``root``.

    Returns:
        Node id of each test without its parameter case, and how many cases it has.

    Raises:
        UsageError: pytest is not installed, or some test file cannot be imported.
    """
    # A pytest that runs this one must not hand it its own options or its place among workers.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, *_COMMAND, "tests"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode:
        told = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise UsageError(
            f"pytest cannot collect the suite: {' / '.join(told[-3:])}",
            where=root / "tests",
            expected="a suite that imports",
            remedy="run pytest --collect-only there, with the dev extra installed",
        )
    cases: dict[str, int] = {}
    for line in done.stdout.splitlines():
        if "::" in line:
            node = line.split("[", 1)[0].strip()
            cases[node] = cases.get(node, 0) + 1
    return cases
