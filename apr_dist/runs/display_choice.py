"""Which display a run has: the live picture, plain lines, or quiet."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TextIO

from apr_dist.choices import ProgressStyle
from apr_dist.runs.display import Display, PlainDisplay, QuietDisplay


def choose_style(wanted: ProgressStyle, stream: TextIO, environment: Mapping[str, str]) -> ProgressStyle:
    """``auto`` as one of the others: the picture on a terminal that can draw one, else plain lines."""
    if wanted is not ProgressStyle.AUTO:
        return wanted
    plain = environment.get("NO_COLOR") or environment.get("CI") or environment.get("TERM") == "dumb"
    return ProgressStyle.RICH if stream.isatty() and not plain else ProgressStyle.PLAIN


def open_display(wanted: ProgressStyle, *, rank: int, synthetic: bool) -> Display:
    """The display of one rank; a run on made-up tokens says so on everything it shows."""
    if rank != 0:
        return Display()
    prefix = "[SYNTHETIC] " if synthetic else ""
    style = choose_style(wanted, sys.stdout, os.environ)
    if style is ProgressStyle.QUIET:
        return QuietDisplay(sys.stdout, prefix=prefix)
    if style is ProgressStyle.PLAIN:
        return PlainDisplay(sys.stdout, prefix=prefix)
    from apr_dist.runs.live_display import LiveDisplay  # noqa: PLC0415  (only a terminal needs rich)

    return LiveDisplay(sys.stdout, prefix=prefix)
