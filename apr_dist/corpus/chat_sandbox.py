"""The sandbox that chat templates run in: what ``transformers`` gives them, within limits.

A template is a program that came with a model file. It gets text and plain values, and can reach nothing
else; its loops are watched, so that it ends, and its output is counted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

LONGEST_S = 10.0
"""Time that one rendering may take."""

LARGEST = 64 * 2**20
"""Characters that one rendering may have."""

MARK_BEGIN, MARK_END = "\U0010fffc", "\U0010fffd"
"""Private characters around what ``{% generation %}`` encloses, where marks are asked for."""

_deadline: ContextVar[float] = ContextVar("deadline", default=float("inf"))
_marking: ContextVar[bool] = ContextVar("marking", default=False)
_clock: ContextVar[datetime | None] = ContextVar("clock", default=None)


def render(
    source: str, variables: Mapping[str, Any], *, now: datetime | None = None, marks: bool = False
) -> str:
    """What a template writes.

    Args:
        source: its text.
        variables: what it may read.
        now: the time that ``strftime_now`` formats; None for the time of the call.
        marks: put ``MARK_BEGIN`` and ``MARK_END`` around what ``{% generation %}`` encloses.

    Raises:
        TemplateError: it is malformed, refuses what it was given, or exceeds a limit.
        TypeError, ValueError, ArithmeticError, LookupError, RecursionError: as its expressions raise them.
    """
    template = compiled(source)
    until = time.monotonic() + LONGEST_S
    deadline, marking, clock = _deadline.set(until), _marking.set(marks), _clock.set(now)
    try:
        pieces, size = [], 0
        for piece in template.generate(**variables):
            size += len(piece)
            if size > LARGEST:
                raise SecurityError(f"it writes more than {LARGEST:,} characters")
            _check_time()
            pieces.append(piece)
        return "".join(pieces)
    finally:
        _deadline.reset(deadline)
        _marking.reset(marking)
        _clock.reset(clock)


@lru_cache(maxsize=64)
def compiled(source: str) -> Template:
    """A template, ready to run.

    Raises:
        TemplateError: it is malformed.
    """
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters |= {"tojson": _to_json, "_watched": _watched}
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": _formatted_now,
        "dict": _Dictionaries(),
        "namespace": _TemplateNamespace,
    }
    try:
        return environment.from_string(source)
    except RecursionError as error:
        raise TemplateError("it is nested too deeply") from error


def marks_generation(source: str) -> bool:
    """Whether a template marks what the assistant says, with ``{% generation %}``."""
    tree = compiled(source).environment.parse(source)
    calls = tree.find_all(nodes.CallBlock)
    return any(isinstance(block.call.node, nodes.ExtensionAttribute) for block in calls)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, whose loops and calls look at the clock and whose sums do not explode."""

    intercepted_binops = frozenset({"*", "**", "+"})

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        for loop in source.find_all(nodes.For):
            watched = nodes.Filter(loop.iter, "_watched", [], [], None, None)
            loop.iter = watched.set_lineno(loop.lineno).set_environment(self)
        return super()._generate(source, *args, **kwargs)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        _check_time()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            if isinstance(left, str | list) and len(left) > LARGEST:
                raise SecurityError(f"it builds a value of more than {LARGEST:,} parts")
        elif operator == "**":
            if not (_is_small(left, 2**32) and _is_small(right, 64)):
                raise SecurityError("it computes too large a power")
        else:
            for one, count in ((left, right), (right, left)):
                if (
                    isinstance(one, str | list | tuple)
                    and isinstance(count, int)
                    and count * len(one) > LARGEST
                ):
                    raise SecurityError(f"it builds a value of {count * len(one):,} parts")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """``{% generation %}``: marks what the assistant said; the text inside is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        """The statements up to ``{% endgeneration %}``, in a scope of their own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        text = caller()
        return f"{MARK_BEGIN}{text}{MARK_END}" if _marking.get() else text


class _Dictionaries:
    """``dict`` for templates: makes dictionaries, and is no type that could be reached through."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _TemplateNamespace(Namespace):
    """``namespace`` for templates: as Jinja's, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        given = dict(*args, **kwargs)
        for name in given:
            _TemplateNamespace._check(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _TemplateNamespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace may have no attribute {name!r}")


def _watched(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _check_time()
        yield value


def _check_time() -> None:
    if time.monotonic() > _deadline.get():
        raise SecurityError(f"it runs for more than {LONGEST_S:g} seconds")


def _is_small(value: Any, bound: int) -> bool:
    return isinstance(value, int | float) and abs(value) <= bound


def _formatted_now(form: str) -> str:
    return (_clock.get() or datetime.now()).strftime(form)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
