"""The verb that explains an id that an error carries."""

from __future__ import annotations

import shutil
import textwrap
from typing import Annotated

import tyro

from apr_dist.contracts.entries import entries, entry_of


def explain(identifier: Annotated[str | None, tyro.conf.Positional] = None, /) -> None:
    """Explain the id of an error: its cause and what to do. Without an id: list all of them.

    Example: apr-dist explain FALSIFY-APR-DIST-TRAINER-004

    Args:
        identifier: the id, as the error prints it in brackets.
    """
    if identifier is None:
        print("\n".join(f"{entry.id:<44}{entry.rule}" for entry in entries()))
    else:
        width = min(shutil.get_terminal_size().columns, 110)
        for line in entry_of(identifier).lines():
            print(textwrap.fill(line, width, subsequent_indent=" " * 12, break_on_hyphens=False))
