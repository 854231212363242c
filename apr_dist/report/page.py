"""One self-contained HTML page of runs, and the pictures beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from apr_dist.atomic_files import write_atomically
from apr_dist.report.conversations import trained_on
from apr_dist.report.figures import Picture, draw
from apr_dist.report.run_folder import Run, config_differences, read_runs
from apr_dist.report.samples import Samples, make_samples


def write_report(
    folders: Sequence[Path], output: Path, *, samples: int | None = 0, prompts: Sequence[str] = ()
) -> list[Path]:
    """Write the page of these runs to ``output`` and its pictures beside it, replacing older ones.

    Args:
        folders: run folders.
        output: the page.
        samples: texts to generate before and after training; None for a few where models are small.
        prompts: what to generate from; by default the beginnings of held-out documents.

    Returns:
        every file written, the page first.

    Raises:
        UsageError: a folder is not a run's.
        OutputError: a file cannot be written.
    """
    runs = read_runs(folders)
    pictures = draw(runs)
    said = [make_samples(run, count=samples, prompts=prompts) for run in runs]
    write_atomically(output, render(runs, pictures, said).encode())
    written = [output]
    for picture in pictures:
        path = output.with_name(f"{output.stem}-{picture.name}.png")
        write_atomically(path, picture.light)
        written.append(path)
    return written


def render(runs: Sequence[Run], pictures: Sequence[Picture], samples: Sequence[Samples]) -> str:
    """The page as HTML that needs nothing but itself."""
    environment = Environment(
        loader=PackageLoader("apr_dist.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        runs=[
            {"run": run, "facts": _facts(run), "samples": said, "trained_on": trained_on(run)}
            for run, said in zip(runs, samples, strict=True)
        ],
        pictures=[
            {"title": one.title, "light": _data_uri(one.light), "dark": _data_uri(one.dark)}
            for one in pictures
        ],
        differences=config_differences(runs) if len(runs) > 1 else [],
        synthetic=[run.name for run in runs if run.verdict and run.verdict.get("synthetic")],
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    """What one reads first about a run, as (words, text)."""
    facts: dict[str, Any] = dict(run.verdict["facts"]) if run.verdict else {}
    losses = run.val_losses
    rows = [("steps", f"{len(run.steps):,} of {run.values.get('num_steps', '?')}")]
    if run.adapter is not None:
        rows.append(("trained", run.adapter))
    if losses:
        change = f"{losses[0]:.4f} to {losses[-1]:.4f}" if len(losses) > 1 else f"{losses[0]:.4f}"
        rows.append(("validation loss", change))
    else:
        rows.append(("validation loss", "never evaluated"))
    for name, (_, values) in run.set_losses().items():
        rows.append((f"validation loss of {name}", f"{values[0]:.4f} to {values[-1]:.4f}"))
    if run.steps:
        rows.append(("tokens", f"{run.steps[-1]['tokens_seen']:,}"))
        rows.append(("median speed", f"{run.median('tokens_per_sec'):,.0f} tokens/s"))
    _, memory = run.series("memory_bytes")
    if memory:
        rows.append(("peak memory", f"{max(memory) / 1e9:,.2f} GB"))
    if run.experts:
        rows.append(("experts", _experts(run.experts)))
    if facts.get("updates_lost"):
        lost = facts["updates_lost"]
        rows.append(
            (
                "updates lost",
                f"{lost['below_half_ulp']:.2%} below half a unit in the last place,"
                f" {lost['unchanged']:.2%} changed nothing",
            )
        )
    if "wall_seconds" in facts:
        rows.append(("wall time", f"{facts['wall_seconds']:,.1f} s"))
    if "strategy" in facts:
        rows.append(("processes", f"{facts['world_size']}, {facts['strategy']}"))
    return rows


def _experts(router: Mapping[str, Any]) -> str:
    """What the routers did with the held-out tokens at the newest evaluation, and experts nobody used."""
    said = (
        f"{router['load_min']:.2f} to {router['load_max']:.2f} times an equal share of the held-out tokens,"
        f" {router['dropped']:.0%} dropped, entropy of the routers {router['entropy']:.2f} nats"
    )
    for key, words in (("idle_held_out", "no held-out token"), ("idle_trained", "no training token")):
        if idle := router.get(key):
            said += f"; {len(idle):,} with {words} ({idle[0]}{', ...' if len(idle) > 1 else ''})"
    return said


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
