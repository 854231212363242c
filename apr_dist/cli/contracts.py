"""Verbs over the contracts: what is promised, by which test, and what that test last said."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from apr_dist.atomic_files import write_atomically
from apr_dist.contracts import collection, overview, repository, scoreboard
from apr_dist.contracts import lint as gates
from apr_dist.errors import ExitCode

Name = Annotated[str, tyro.conf.Positional]


def validate() -> int:
    """Check every contracts/*.yaml against the schema, with file and line.

    Example: apr-dist contracts validate
    """
    findings = gates.validate(repository.find_root())
    for finding in findings:
        print(f"error: {finding}", file=sys.stderr)
    print("contracts are valid" if not findings else f"{len(findings)} finding(s)")
    return int(ExitCode.GATE if findings else ExitCode.OK)


def lint(*, strict_test_binding: bool = False) -> int:
    """Run every gate over contracts and tests.

    Example: apr-dist contracts lint --strict-test-binding

    Args:
        strict_test_binding: also let pytest collect, and require every bound test among what it found.
    """
    root = repository.find_root()
    collected = collection.collect(root) if strict_test_binding else None
    report = gates.lint(repository.read_repository(root), collected=collected)
    for finding in report.findings:
        print(f"error: {finding}", file=sys.stderr)
    print(f"{len(report.outcomes)} gates, {len(report.findings)} finding(s)")
    return int(ExitCode.OK if report.ok else ExitCode.GATE)


def status(*, markdown: Path | None = None, html: Path | None = None) -> None:
    """Show each falsifier: its meaning, its test, what that test last said, and its level.

    Example: apr-dist contracts status --html scoreboard.html

    Args:
        markdown: also write the scoreboard as Markdown.
        html: also write it as one self-contained page.
    """
    found = repository.read_repository(repository.find_root())
    contracts, rows = overview.contract_rows(found), overview.status_rows(found)
    text = scoreboard.markdown(contracts, rows)
    if markdown is not None:
        write_atomically(markdown, text.encode())
    if html is not None:
        write_atomically(html, scoreboard.html_page(contracts, rows).encode())
    print(text)


def explain(falsifier: Name, /) -> None:
    """Say what a falsifier pins, why, and how it fails when broken.

    Example: apr-dist contracts explain FALSIFY-INIT-ARCH-MATCH-001

    Args:
        falsifier: its id.
    """
    found = repository.read_repository(repository.find_root())
    print("\n".join(overview.explain(found, falsifier)))
