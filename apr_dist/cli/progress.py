"""Progress of a verb: a bar on a terminal, nothing where output is read by a program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from apr_dist.corpus.encode import EncodeProgress


@contextmanager
def bytes_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over bytes; the function it hands out takes (done, in all)."""
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def encode_progress() -> Iterator[Callable[[EncodeProgress], None]]:
    """A bar over source bytes with tokens per second; the function takes what the encoder reports."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("encoding", total=None)

        def told(now: EncodeProgress) -> None:
            text = f"encoding: {now.tokens:,} tokens, {now.tokens_per_s:,.0f}/s"
            bar.update(task, completed=now.bytes_done, total=now.bytes_total, description=text)

        yield told
