"""The verdict as a table of text, for the end of a run."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from apr_dist.training.verdict import Verdict


def verdict_lines(verdict: Verdict, *, width: int = 118) -> list[str]:
    """The verdict as lines of text: each gate, what was measured, what was required, pass or fail."""
    table = Table(title=None, show_lines=False, pad_edge=False)
    for heading in ("gate", "measured", "required", "result", "falsifier"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "result")
    for gate in verdict.gates:
        failed = "FAIL" if gate.ship_blocking else "not met (advisory)"
        result = "pass" if gate.passed else failed
        table.add_row(gate.gate, gate.measured, gate.required, result, gate.id.removeprefix("FALSIFY-"))
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None, legacy_windows=False).print(table)
    lines = ["", "Verdict", *buffer.getvalue().rstrip().splitlines()]
    end = "every ship-blocking gate passed" if not verdict.failed else f"{len(verdict.failed)} gate(s) FAILED"
    return [*lines, f"{verdict.status}: {verdict.detail}; {end} (exit code {int(verdict.exit_code)})"]
