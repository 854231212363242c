"""A file of prompts: texts or chats that a model is asked again and again while it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apr_dist.corpus.conversations import Shape, read_conversation
from apr_dist.errors import CorpusError
from apr_dist.parsing import parse_json

LARGEST_BYTES = 1 << 20
"""Every prompt is answered at every evaluation; more than this is no file of prompts."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: what is shown of it.
        messages: the chat it stands for, that the assistant answers next; None for plain text.
    """

    text: str
    messages: tuple[dict[str, Any], ...] | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: one a line, of a ``.jsonl`` file texts, ``prompt``, or ``messages``.

    Raises:
        CorpusError: it cannot be read, is too large, contains none, or a line is no prompt.
    """
    try:
        raw = path.read_bytes()
        lines = raw.decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(
            f"the prompts cannot be read ({error})", where=path, expected="text in UTF-8, a prompt a line"
        ) from error
    if len(raw) > LARGEST_BYTES:
        raise CorpusError(
            f"the file of prompts has {len(raw):,} bytes",
            where=path,
            expected=f"at most {LARGEST_BYTES:,}, as every prompt is answered at every evaluation",
            remedy="keep a few prompts",
        )
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise CorpusError("there is no prompt", where=path, expected="a prompt a line")
    if path.suffix == ".jsonl":
        return [_of_json(line, f"{path}:{number}") for number, line in numbered]
    return [Prompt(line) for _, line in numbered]


def _of_json(line: str, where: str) -> Prompt:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise CorpusError(f"the line is not JSON ({error})", where=where, expected=_EXPECTED) from error
    if isinstance(value, Mapping) and "messages" in value:
        messages = read_conversation(value, Shape.MESSAGES, where).messages
        said = next((one["content"] for one in reversed(messages) if one["role"] == "user"), None)
        if said is None:
            raise CorpusError("no user says anything", where=where, expected="a message of the role user")
        return Prompt(said if isinstance(said, str) else str(said), messages)
    text = value.get("prompt") if isinstance(value, Mapping) else value
    if not isinstance(text, str) or not text:
        raise CorpusError("the line is no prompt", where=where, expected=_EXPECTED)
    return Prompt(text)


_EXPECTED = 'a JSON text, {"prompt": TEXT} or {"messages": [...]}'
