"""The curves of one or more runs, each drawn for a light and for a dark page."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from apr_dist.report.run_folder import Run

mpl.use("Agg")


@dataclass(frozen=True)
class Theme:
    """Colours of one kind of page; ``series`` are told apart without hue by line style or hatching too."""

    background: str
    text: str
    grid: str
    series: tuple[str, ...]


LIGHT = Theme("#ffffff", "#1d232b", "#d9dee5", ("#1a5fb4", "#c64600", "#1f7a3f", "#813d9c", "#8a6a00"))
DARK = Theme("#171b21", "#e6e9ee", "#39414d", ("#78aeed", "#ffa06b", "#7fd69a", "#d3a0ea", "#e5c860"))

_STYLES = ("-", "--", "-.", ":")
_HATCHES = ("", "//", "..", "xx", "--")
_WINDOWS = 20
"""A smoothed curve's window is twice this part of the run."""

_WIDEST_HALF = 50
_WIDE_LABEL = 26
_LONGEST_NAME = 18
_HEADROOM = 1.08
_FEW_STEPS = 20

Draw = Callable[[Axes, Run, str, str], bool]


@dataclass(frozen=True)
class Picture:
    """One figure: its name for files, its title, and the PNG bytes for each kind of page."""

    name: str
    title: str
    light: bytes
    dark: bytes


def draw(runs: Sequence[Run]) -> list[Picture]:
    """Every figure the runs have something to show for, all runs in each."""
    pictures = []
    for name, title, unit, plot in FIGURES:
        light, dark = (_render(runs, unit, plot, theme) for theme in (LIGHT, DARK))
        if light is not None and dark is not None:
            pictures.append(Picture(name, title, light, dark))
    if any(sum(run.phases_s.values()) for run in runs):
        pictures.append(Picture("phases", "Time by phase", _phases(runs, LIGHT), _phases(runs, DARK)))
    return pictures


def smooth(values: Sequence[float]) -> tuple[list[float], int]:
    """A curve through the values without lag, and how many values its widest window spans.

    Each point is the mean of the values around it, as many before as after. A window begins narrow, because
    losses fall fast at first: it reaches no further than a quarter of the way back to the start. At the end,
    where fewer values follow than precede, the point lies on the line that fits its window best.
    """
    count = len(values)
    half = min(max(count // _WINDOWS, 1), _WIDEST_HALF)
    found = np.asarray(values, np.float64)
    sums = np.concatenate(([0.0], np.cumsum(found)))
    places = np.arange(count)
    before = np.minimum(half, places // 4)
    after = np.minimum(before, count - 1 - places)
    means = (sums[places + after + 1] - sums[places - before]) / (before + after + 1)
    for place in places[after < before]:
        offsets = np.arange(-before[place], after[place] + 1)
        window = found[place + offsets]
        slope = np.sum((offsets - offsets.mean()) * window) / np.sum((offsets - offsets.mean()) ** 2)
        means[place] = window.mean() - slope * offsets.mean()
    return means.tolist(), 2 * half + 1


def plot_runs(axes: Axes, runs: Sequence[Run], plot: Draw, theme: Theme) -> bool:
    """Draw all runs over each other; whether any had something to show."""
    drawn = [
        plot(axes, run, theme.series[index % len(theme.series)], _STYLES[index % len(_STYLES)])
        for index, run in enumerate(runs)
    ]
    highest = max((float(np.max(line.get_ydata())) for line in axes.lines), default=0.0)
    if axes.get_ylim()[0] == 0.0 and highest > 0.0:
        axes.set_ylim(0.0, _HEADROOM * highest)  # a curve that is level does not lie on the edge
    return any(drawn)


def _render(runs: Sequence[Run], unit: str, plot: Draw, theme: Theme) -> bytes | None:
    figure, axes = _canvas(theme)
    if not plot_runs(axes, runs, plot, theme):
        return None
    _dress(axes, theme, unit)
    labels = axes.get_legend_handles_labels()[1]
    if len(labels) > 1:
        columns = 2 if max(map(len, labels)) <= _WIDE_LABEL else 1
        figure.legend(
            loc="outside lower center", frameon=False, fontsize=9, labelcolor=theme.text, ncols=columns
        )
    return _png(figure)


def _canvas(theme: Theme) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.7, 3.2), dpi=200, layout="constrained", facecolor=theme.background)
    return figure, figure.subplots()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _phases(runs: Sequence[Run], theme: Theme) -> bytes:
    """A bar for each run, its parts the seconds of each phase."""
    figure, axes = _canvas(theme)
    names = [_short(run) for run in runs]
    ends = [0.0] * len(runs)
    for index, phase in enumerate(runs[0].phases_s):
        parts = [run.phases_s[phase] for run in runs]
        if not sum(parts):
            continue
        colour = theme.series[index % len(theme.series)]
        hatch = _HATCHES[(index + index // len(theme.series)) % len(_HATCHES)]  # no two phases look the same
        places = list(range(len(runs)))
        share = sum(parts) / max(sum(sum(run.phases_s.values()) for run in runs), 1e-9)
        label = f"{phase} {100 * share:.1f} %" if len(runs) == 1 else phase
        axes.barh(
            places, parts, left=ends, color=colour, hatch=hatch, edgecolor=theme.background, label=label
        )
        ends = [end + part for end, part in zip(ends, parts, strict=True)]
    _dress(axes, theme, "", x="seconds", whole=False)
    axes.set_yticks(list(range(len(runs))), names if len(runs) > 1 else [""])
    axes.set_ylim(len(runs) - 0.3, -0.7)
    figure.legend(loc="outside lower center", frameon=False, fontsize=9, labelcolor=theme.text, ncols=2)
    return _png(figure)


def _short(run: Run) -> str:
    """The end of a long name, which is where names of runs differ."""
    return run.name if len(run.name) <= _LONGEST_NAME else f"...{run.name[-_LONGEST_NAME:]}"


def _dress(axes: Axes, theme: Theme, unit: str, *, x: str = "step", whole: bool = True) -> None:
    axes.set_facecolor(theme.background)
    axes.set_xlabel(x, color=theme.text, fontsize=10)
    axes.set_ylabel(unit, color=theme.text, fontsize=10)
    axes.grid(color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.text, labelsize=9, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=whole))
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.grid)
    if axes.get_ylim()[1] >= 1000:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _loss(axes: Axes, run: Run, colour: str, style: str) -> bool:
    steps, values = run.series("train_loss")
    if steps:
        few = len(steps) < _FEW_STEPS
        raw = f"{_short(run)}: training" + ("" if few else ", each step")
        axes.plot(
            steps, values, color=colour, linewidth=1.4 if few else 0.8, alpha=1 if few else 0.35, label=raw
        )
        if not few:
            means, window = smooth(values)
            label = f"{_short(run)}: mean of up to {window} around"
            axes.plot(steps, means, color=colour, linewidth=1.6, linestyle=style, label=label)
    found = [(line["step"], line["val_loss"]) for line in run.evaluations if line.get("val_loss") is not None]
    if found:
        x, y = zip(*found, strict=True)
        label = f"{_short(run)}: validation"
        axes.plot(x, y, color=colour, linestyle="none", marker="o", markersize=4.5, label=label)
    for marker, (name, (at, losses)) in zip(cycle("sD^vPX"), run.set_losses().items(), strict=False):
        label = f"{_short(run)}: {name}"
        axes.plot(at, losses, ":", color=colour, linewidth=0.9, marker=marker, markersize=4, label=label)
    return bool(steps or found)


def _line(key: str) -> Draw:
    def plot(axes: Axes, run: Run, colour: str, style: str) -> bool:
        steps, values = run.series(key)
        if steps:
            axes.plot(steps, values, color=colour, linewidth=1.4, linestyle=style, label=_short(run))
            if len(steps) == 1:
                axes.lines[-1].set_marker("o")
        return bool(steps)

    return plot


def _from_zero(key: str) -> Draw:
    plot = _line(key)

    def plot_from_zero(axes: Axes, run: Run, colour: str, style: str) -> bool:
        drawn = plot(axes, run, colour, style)
        axes.set_ylim(bottom=0, auto=True)  # the next run may reach higher
        return drawn

    return plot_from_zero


def _data_wait(axes: Axes, run: Run, colour: str, style: str) -> bool:
    steps, waits = run.series("data_wait_ms")
    _, walls = run.series("wall_ms")
    if not steps or len(walls) != len(waits):
        return False
    shares = [100 * wait / wall for wait, wall in zip(waits, walls, strict=True)]
    axes.plot(steps, shares, color=colour, linewidth=1.4, linestyle=style, label=_short(run))
    axes.set_ylim(bottom=0, auto=True)  # the next run may reach higher
    return True


def _scaled(key: str, factor: float) -> Draw:
    def plot(axes: Axes, run: Run, colour: str, style: str) -> bool:
        steps, values = run.series(key)
        if steps:
            scaled = [factor * value for value in values]
            axes.plot(steps, scaled, color=colour, linewidth=1.4, linestyle=style, label=_short(run))
            axes.set_ylim(bottom=0, auto=True)  # the next run may reach higher
        return bool(steps)

    return plot


FIGURES: tuple[tuple[str, str, str, Draw], ...] = (
    ("loss", "Loss", "nats per token", _loss),
    ("learning-rate", "Learning rate", "lr", _line("lr")),
    ("throughput", "Throughput", "tokens per second", _from_zero("tokens_per_sec")),
    ("gradient-norm", "Gradient norm before clipping", "norm", _from_zero("grad_norm")),
    ("mfu", "Model FLOPs utilisation", "% of the peak", _scaled("mfu", 100.0)),
    ("memory", "Peak memory so far", "GB", _scaled("memory_bytes", 1e-9)),
    ("expert-load", "Busiest expert", "times an equal share", _from_zero("router.load_max")),
    ("balance-loss", "Load-balancing loss, without its weight", "loss", _line("router.balance_loss")),
    ("data-wait", "Time spent waiting for data", "% of the step", _data_wait),
)
"""Every figure of runs over each other: its name for files, its title, its unit, and what draws it."""
