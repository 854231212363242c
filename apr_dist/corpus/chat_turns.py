"""Where each turn of a rendered chat begins, found while its template runs once.

To render the first messages alone takes a rendering for each turn. But a template runs the same way on the
first messages as on all of them until it looks at something that only the longer list has. So it gets the
messages in a list that notes how much was written when each was first looked at. Where the template's own
loop did that, fetching a message after it had done the one before, the shorter rendering would leave the loop
there and write what follows it: the closing, which must depend on no message. Where a message was looked at
in any other way, nothing is concluded, and the caller renders the first messages alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import nodes

_MESSAGES, _PROMPT = "messages", "add_generation_prompt"


@dataclass
class Trace:
    """What is noted during one rendering.

    Attributes:
        written: characters so far.
        known: how many messages the template has looked at, from the first on.
        between: the loop has done a message, and not begun with the next one.
        starts: by number of a message, the characters before it, where the loop fetched it and nothing had
            looked at it before.
        failed: the list was used as no list can be followed.
    """

    written: int = 0
    known: int = 0
    between: bool = False
    starts: dict[int, int] = field(default_factory=dict)
    failed: bool = False

    def look_at(self, number: int, *, fetched: bool = False) -> None:
        """A message is looked at, and with it all before it: that they are there is known."""
        if number >= self.known:
            if fetched and self.between and number == self.known:
                self.starts[number] = self.written
            self.known = number + 1


@dataclass(frozen=True)
class Turns:
    """What one rendering shows of its turns.

    Attributes:
        text: all of it.
        starts: by number of a message, how much of ``text`` the messages before it alone are rendered to.
        prompt: what follows that where the assistant is to answer.
    """

    text: str
    starts: Mapping[int, int]
    prompt: str


class FollowedMessages:
    """A list of messages, or all of it from some message on, that notes who looks at what.

    No ``list``: nothing can look into it without its methods, which are all that lists have for a template.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, messages: Sequence[Mapping[str, Any]], trace: Trace, first: int = 0) -> None:
        self._messages, self._trace, self._first = messages, trace, first

    def _turns(self) -> Iterator[Mapping[str, Any]]:
        for number in range(self._first, len(self._messages)):
            self._trace.look_at(number, fetched=True)
            yield self._messages[number]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for number in range(self._first, len(self._messages)):
            self._trace.look_at(number)
            yield self._messages[number]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int) and key >= 0:
            self._trace.look_at(self._first + key)
            return self._messages[self._first + key]
        if isinstance(key, slice) and key.stop is None and key.step is None:
            start = 0 if key.start is None else key.start
            if isinstance(start, int) and start >= 0:
                return FollowedMessages(self._messages, self._trace, self._first + start)
        return self._all()[key]

    def __len__(self) -> int:
        return len(self._all())

    def __bool__(self) -> bool:
        self._trace.look_at(self._first)
        return self._first < len(self._messages)

    def __eq__(self, other: object) -> bool:
        return self._all() == (other._all() if isinstance(other, FollowedMessages) else other)

    def __repr__(self) -> str:
        return repr(self._all())

    def __getattr__(self, name: str) -> Any:
        self._trace.failed = True
        raise AttributeError(name)

    def _all(self) -> list[Mapping[str, Any]]:
        self._trace.look_at(len(self._messages))
        return list(self._messages[self._first :])


def turns_of(messages: FollowedMessages) -> Iterator[Mapping[str, Any]]:
    """As ``iter(messages)``, for the loop whose turns are noted."""
    return messages._turns()


def loop_over_turns(template: nodes.Template) -> nodes.For | None:
    """The loop whose turns are noted: the last of the outermost ones, which write as they go."""
    loops = [node for node in template.body if isinstance(node, nodes.For) and not node.recursive]
    return loops[-1] if loops else None


def closing_of(template: nodes.Template) -> list[nodes.Node] | None:
    """What follows that loop, if it is the same after any messages; else None.

    It must be all that reads whether a prompt is asked for, and must read nothing that the template sets.
    """
    loop = loop_over_turns(template)
    others = (nodes.Block, nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport)
    if loop is None or any(template.find_all(others)):
        return None
    at = template.body.index(loop)
    before = [node for node in template.body[: at + 1] if not _is_for_no_prompt(node)]
    closing = template.body[at + 1 :]
    if _PROMPT in _names(before, "load", "store", "param"):
        return None
    changing = _names([*before, *closing], "store", "param") | {_MESSAGES}
    changing |= {macro.name for macro in template.find_all(nodes.Macro)}
    return None if _names(closing, "load") & changing else closing


def _is_for_no_prompt(node: nodes.Node) -> bool:
    """``{% if not add_generation_prompt is defined %}``: it always is."""
    if not isinstance(node, nodes.If) or node.elif_ or node.else_ or not isinstance(node.test, nodes.Not):
        return False
    test = node.test.node
    asked = test.node if isinstance(test, nodes.Test) and test.name == "defined" else None
    return isinstance(asked, nodes.Name) and asked.name == _PROMPT


def _names(parts: Sequence[nodes.Node], *contexts: str) -> set[str]:
    return {
        name.name
        for part in parts
        for name in ([part] if isinstance(part, nodes.Name) else part.find_all(nodes.Name))
        if name.ctx in contexts
    }
