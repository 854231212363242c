"""The figure of ``bench_loader``'s results: rates back to back, and hand-over after think time.

python benchmarks/bench_loader.py --sections throughput handover --json results.json
python benchmarks/loader_plot.py results.json docs/images/loader.svg
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

mpl.use("Agg")

OURS, LIMIT, OTHERS = "#1a5fb4", "#8a6a00", "#9aa3ad"


def colour(name: str) -> str:
    """This loader, the bare copy it is measured against, or another way."""
    if name.startswith("apr-dist"):
        return OURS
    return LIMIT if name.startswith("C gather") else OTHERS


def draw_rates(axes: Axes, rates: dict[str, list[float]]) -> None:
    """Median million tokens/s, with whiskers from the smallest to the largest round."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    names = sorted(medians, key=lambda name: medians[name])
    middle = [medians[name] for name in names]
    whiskers = [
        [medians[name] - min(rates[name]) for name in names],
        [max(rates[name]) - medians[name] for name in names],
    ]
    axes.barh(
        names, middle, xerr=whiskers, color=[colour(name) for name in names], ecolor="#1d232b", height=0.7
    )
    axes.set_xscale("log")
    axes.set_xlim(left=min(middle) / 2, right=max(middle) * 4)
    for place, value in enumerate(middle):
        axes.annotate(
            f"{value:,.0f}",
            (max(rates[names[place]]), place),
            (4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_title("Hot, back to back: million tokens/s (logarithmic)", loc="left")


def draw_handover(axes: Axes, quantiles: dict[str, list[float]]) -> None:
    """From the median to the 99.9th percentile of a call's time, in us."""
    chosen = {name.removesuffix(", sleep"): q for name, q in quantiles.items() if name.endswith(", sleep")}
    names = sorted(chosen, key=lambda name: chosen[name][0], reverse=True)
    for place, name in enumerate(names):
        p50, p99, tail = chosen[name]
        axes.plot([p50, tail], [place, place], color=colour(name), linewidth=2)
        axes.plot([p50], [place], "o", color=colour(name))
        axes.plot([p99, tail], [place, place], "|", color=colour(name), markersize=9)
    axes.set_yticks(range(len(names)), names)
    axes.set_xscale("log")
    axes.set_title("Next batch after 5 ms of think time, us: median, p99, p99.9", loc="left")


def figure_of(results: dict[str, Any]) -> Figure:
    """Both panels, with the conditions of the measurement under them."""
    rows = len(results["throughput"]["rates"])
    figure = Figure(figsize=(9, 0.62 * rows), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    draw_rates(upper, results["throughput"]["rates"])
    draw_handover(lower, results["handover"]["p50 p99 p99.9"])
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#d9dee5", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.supxlabel(results["conditions"], fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="what bench_loader.py --json wrote")
    parser.add_argument("picture", type=Path, help="an .svg or .png to write")
    arguments = parser.parse_args()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "loader", "font.size": 9}):
        figure = figure_of(json.loads(arguments.results.read_text()))
        arguments.picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(
            arguments.picture, metadata={"Date": None} if arguments.picture.suffix == ".svg" else None
        )


if __name__ == "__main__":
    main()
