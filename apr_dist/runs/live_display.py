"""The live picture of a run on a terminal: a bar, the figures of the last step, sentences kept above it.

What the figures are called and how they read is in ``display``, which also has the displays for logs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from apr_dist.runs.display import (
    NOT_AVAILABLE,
    Display,
    Pace,
    answer_texts,
    duration,
    evaluation_text,
    figures_of,
)

_CELL_WIDTH = 25
"""Columns that a figure and its name take; the picture has as many side by side as fit."""

_LEAST_FOR_A_FRAME = 40
_REFRESHES_PER_SECOND = 4
_SHOWN = (
    "loss",
    "smoothed",
    "validation",
    "lr",
    "grad norm",
    "tokens/s",
    "MFU",
    "memory",
    "data wait",
    "GPU",
)


class Picture:
    """What is drawn: it reads the state at the moment of drawing, so a clock in it goes on."""

    def __init__(self, pace: Pace, title: str) -> None:
        self._pace, self._title = pace, title
        self._began = time.monotonic()
        self._figures = dict.fromkeys(_SHOWN, NOT_AVAILABLE)
        self.doing = "starting"

    def step(self, line: Mapping[str, Any]) -> None:
        """Take in a step line of metrics.jsonl."""
        self._pace.step(line)
        self._figures |= figures_of(line, self._pace)
        self.doing = "training"

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """Take in an evaluation line of metrics.jsonl."""
        self._pace.evaluation(line)
        self.doing = "training"
        loss = line["val_loss"]
        self._figures["validation"] = "not finite" if loss is None else f"{loss:.4f} (at {line['step']})"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw for the width there is now: a terminal may be resized during a run."""
        framed = options.max_width >= _LEAST_FOR_A_FRAME
        width = options.max_width - (4 if framed else 0)
        inside = Group(self._bar(), self._times(), self._table(width))
        yield Panel(inside, title=self._title, title_align="left", border_style="cyan") if framed else inside

    def _bar(self) -> RenderableType:
        pace = self._pace
        row = Table.grid(expand=True, padding=(0, 1))
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        share = 100 * pace.done / pace.steps if pace.steps else 100
        bar = ProgressBar(total=max(pace.steps, 1), completed=pace.done if pace.steps else 1)
        row.add_row(f"step {pace.done:,}/{pace.steps:,}", bar, f"{share:.0f} %")
        return row

    def _times(self) -> RenderableType:
        passed = duration(time.monotonic() - self._began)
        left = duration(self._pace.left_s)
        return Text(f"{passed} passed, {left} left: {self.doing}", style="dim", overflow="ellipsis")

    def _table(self, width: int) -> RenderableType:
        columns = max(1, width // _CELL_WIDTH)
        table = Table.grid(padding=(0, 1), expand=True)
        for _ in range(columns):
            table.add_column(style="dim", no_wrap=True)
            table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        cells = [(name, self._figures[name]) for name in _SHOWN]
        for first in range(0, len(cells), columns):
            table.add_row(*(text for cell in cells[first : first + columns] for text in cell))
        return table


class LiveDisplay(Display):
    """Sentences above, the picture below them while steps are made; the last picture stays."""

    def __init__(self, stream: TextIO, *, prefix: str = "") -> None:
        super().__init__()
        self._console = Console(file=stream, force_terminal=True, highlight=False)
        self._prefix = prefix
        self.width = min(self.width, self._console.width - len(prefix))
        self._live: Live | None = None
        self._picture: Picture | None = None
        self._work: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, line: str) -> None:
        """Write one sentence above the picture."""
        style = "yellow" if line.startswith("warning:") else "green" if line.startswith("gate passed") else ""
        self._console.print(Text(self._prefix + line, style=style))

    def measured(self, line: Mapping[str, Any]) -> None:
        """Put a step into the picture; an evaluation also stays as a sentence."""
        if line["kind"] == "step" and self._picture is not None:
            self._picture.step(line)
        elif line["kind"] == "evaluation":
            if self._picture is not None:
                self._picture.evaluation(line)
            self(evaluation_text(line))
        elif line["kind"] == "answers":
            for said in answer_texts(line):
                self(said)

    def evaluating(self, done: int, of: int) -> None:
        """Say in the picture how far an evaluation is."""
        if self._picture is not None:
            self._picture.doing = f"evaluating, {done} of {of} batches"

    def working(self, what: str, done: int, of: int) -> None:
        """Draw a bar for each piece of work until training begins."""
        if self._live is not None:
            return
        if self._work is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
            )
            self._work = Progress(*columns, console=self._console, transient=True)
            self._work.start()
        if what not in self._tasks:
            self._tasks[what] = self._work.add_task(what)
        self._work.update(self._tasks[what], completed=done, total=of, visible=done < of)

    def _stop_work(self) -> None:
        if self._work is not None:
            self._work.stop()
        self._work, self._tasks = None, {}

    @contextmanager
    def training(self, pace: Pace) -> Iterator[None]:
        """Draw the picture until the block ends, however it ends."""
        self._stop_work()
        self._picture = Picture(pace, self._prefix + "apr-dist")
        self._live = Live(
            self._picture, console=self._console, refresh_per_second=_REFRESHES_PER_SECOND, transient=False
        )
        with self._live:
            self._picture.doing = "evaluating"
            try:
                yield
                self._picture.doing = "done"
            except BaseException:
                self._picture.doing = "stopped"
                raise

    def close(self) -> None:
        """Leave the terminal as it was found."""
        self._stop_work()
        if self._live is not None:
            self._live.stop()
