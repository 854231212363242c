"""A conversation with a model: its turns kept, its answers printed as they come."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from apr_dist.errors import UsageError

HELP = "Ctrl-D or /exit ends the conversation, /reset begins a new one, Ctrl-C stops an answer."


def converse(answer: Callable[[Sequence[dict[str, Any]]], Iterator[str]], *, system: str | None) -> None:
    """Answer what is typed until it ends.

    A turn that the model has no room for is refused and not kept.

    Args:
        answer: gives the text of the assistant's next turn, piece by piece.
        system: what the conversation begins with; None for what the template says itself.
    """
    with suppress(ImportError):
        import readline  # noqa: F401, PLC0415  (gives input() its line editing)
    print(HELP, file=sys.stderr)
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
    while (said := _typed()) is not None:
        if said == "/reset":
            messages = list(opening)
            continue
        if not said.strip():
            continue
        asked = [*messages, {"role": "user", "content": said}]
        try:
            text = _printed(answer(asked))
        except UsageError as error:
            print(f"error: {error} Or begin again with /reset.", file=sys.stderr)
            continue
        messages = [*asked, {"role": "assistant", "content": text}]


def _typed() -> str | None:
    """A line of the user; None at the end."""
    try:
        said = input("> ")
    except EOFError:
        print()
        return None
    return None if said.strip() == "/exit" else said


def _printed(pieces: Iterator[str]) -> str:
    """The answer, as far as nobody stops it."""
    text = ""
    with suppress(KeyboardInterrupt):
        for piece in pieces:
            text += piece
            print(piece, end="", flush=True)
    print(flush=True)
    return text
