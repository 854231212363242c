"""The verdict as a table of text, for the end of a run; and any table as text."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Sequence

from rich.console import Console
from rich.table import Table

from apr_dist.gates.result import GateResult
from apr_dist.runs.verdict import Verdict

_LEAST_FOR_A_TABLE = 80


def verdict_lines(verdict: Verdict, *, width: int = 118) -> list[str]:
    """The verdict as lines of text: each gate, what was measured, what was required, pass or fail.

    Where a table does not fit the width, each gate is a few lines of its own.
    """
    lines = ["", "Verdict"]
    lines += _table(verdict, width) if width >= _LEAST_FOR_A_TABLE else _stacked(verdict)
    end = "every ship-blocking gate passed" if not verdict.failed else f"{len(verdict.failed)} gate(s) FAILED"
    return [*lines, f"{verdict.status}: {verdict.detail}; {end} (exit code {int(verdict.exit_code)})"]


def table_lines(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, width: int = 110, whole: Collection[str] = ()
) -> list[str]:
    """A table without colours, as lines; columns of the headings in ``whole`` are never wrapped."""
    table = Table(pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold", no_wrap=heading in whole)
    for row in rows:
        table.add_row(*row)
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None, legacy_windows=False).print(table, markup=False)
    return buffer.getvalue().rstrip().splitlines()


def _table(verdict: Verdict, width: int) -> list[str]:
    rows = [
        (gate.gate, gate.measured, gate.required, _result(gate), gate.id.removeprefix("FALSIFY-"))
        for gate in verdict.gates
    ]
    headings = ("gate", "measured", "required", "result", "falsifier")
    return table_lines(headings, rows, width=width, whole=("result",))


def _stacked(verdict: Verdict) -> list[str]:
    return [
        line
        for gate in verdict.gates
        for line in (
            f"{_result(gate)}: {gate.gate}",
            f"  measured {gate.measured}",
            f"  required {gate.required}",
            f"  {gate.id}",
        )
    ]


def _result(gate: GateResult) -> str:
    failed = "FAIL" if gate.ship_blocking else "not met (advisory)"
    return "pass" if gate.passed else failed
