"""The verdict as a table of text, for the end of a run."""

from __future__ import annotations

import io

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


def _table(verdict: Verdict, width: int) -> list[str]:
    table = Table(title=None, show_lines=False, pad_edge=False)
    for heading in ("gate", "measured", "required", "result", "falsifier"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "result")
    for gate in verdict.gates:
        falsifier = gate.id.removeprefix("FALSIFY-")
        table.add_row(gate.gate, gate.measured, gate.required, _result(gate), falsifier)
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None, legacy_windows=False).print(table)
    return buffer.getvalue().rstrip().splitlines()


def _stacked(verdict: Verdict) -> list[str]:
    lines = []
    for gate in verdict.gates:
        lines += [
            f"{_result(gate)}: {gate.gate}",
            f"  measured {gate.measured}",
            f"  required {gate.required}",
        ]
        lines += [f"  {gate.id}"]
    return lines


def _result(gate: GateResult) -> str:
    failed = "FAIL" if gate.ship_blocking else "not met (advisory)"
    return "pass" if gate.passed else failed
