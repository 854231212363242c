"""The verb that draws what runs left behind."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import tyro

from apr_dist.errors import UsageError


def report(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    /,
    *,
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    samples: int | None = None,
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
) -> None:
    """Write one HTML page of runs: curves, gates, verdicts, samples, configuration differences.

    Example: apr-dist report runs/first runs/second -o comparison.html

    Args:
        runs: run folders; several are drawn over each other.
        output: page to write, its pictures beside it; by default report.html in the first run folder.
        samples: texts to generate before and after training; 0 none; by default 2 where models are small.
        prompt: generate from this text instead of held-out ones; may be given several times.
    """
    if not runs:
        raise UsageError("no run folder was named", where="command line", expected="RUN_DIR [RUN_DIR...]")
    if samples is not None and samples < 0:
        raise UsageError(f"{samples} samples", where="--samples", expected="0 or more")
    if find_spec("matplotlib") is None:
        raise UsageError(
            "matplotlib is not installed",
            expected="the extra that draws reports",
            remedy="pip install 'apr-dist[report]'",
        )
    from apr_dist.report.page import write_report  # noqa: PLC0415  (drawing is an extra)

    page = output or runs[0] / "report.html"
    for path in write_report(runs, page, samples=samples, prompts=prompt):
        print(path)
