"""The sandbox that chat templates run in: what ``transformers`` gives them, within limits.

A template is a program that came with a model file. It gets text and plain values, and can reach nothing
else; its loops are watched, so that it ends, and its output is counted. How large a value it may build is in
``chat_limits``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from types import BuiltinMethodType, MethodType
from typing import Any, NoReturn

from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from apr_dist.corpus import chat_limits
from apr_dist.corpus.chat_turns import (
    FollowedMessages,
    Trace,
    Turns,
    closing_of,
    loop_over_turns,
    turns_of,
)

LONGEST_S = 10.0
"""Time that one rendering may take."""

MARK_BEGIN, MARK_END = "\U0010fffc", "\U0010fffd"
"""Private characters around what ``{% generation %}`` encloses, where marks are asked for."""

_deadline: ContextVar[float] = ContextVar("deadline", default=float("inf"))
_marking: ContextVar[bool] = ContextVar("marking", default=False)
_clock: ContextVar[datetime | None] = ContextVar("clock", default=None)
_trace: ContextVar[Trace | None] = ContextVar("trace", default=None)


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
    with _limits(now, marks=marks):
        return _written(compiled(source), variables, Trace())


def trace_turns(source: str, variables: Mapping[str, Any], *, now: datetime) -> Turns | None:
    """What a template writes, with where each turn begins, as far as one rendering shows it.

    Args:
        source: its text.
        variables: what it may read; ``messages`` among them.
        now: the time that ``strftime_now`` formats.

    Returns:
        None where what follows the turns is not known to be the same after any messages.

    Raises:
        As `render`.
    """
    closing = _closing(source)
    if closing is None:
        return None
    trace = Trace()
    with _limits(now, marks=False), _following(trace):
        messages = FollowedMessages(variables["messages"], trace)
        text = _written(compiled(source), {**variables, "messages": messages}, trace)
        closed, prompt = (
            _written(closing, {**variables, "add_generation_prompt": one}, Trace()) for one in (False, True)
        )
    return None if trace.failed or closed else Turns(text, trace.starts, prompt)


def _written(template: Template, variables: Mapping[str, Any], trace: Trace) -> str:
    pieces = []
    for piece in template.generate(**variables):
        trace.written += len(piece)
        if trace.written > chat_limits.LARGEST:
            raise SecurityError(f"it writes more than {chat_limits.LARGEST:,} characters")
        _check_time()
        pieces.append(piece)
    return "".join(pieces)


@contextmanager
def _limits(now: datetime | None, *, marks: bool) -> Iterator[None]:
    """What one rendering may take, and what it is told."""
    deadline, marking = _deadline.set(time.monotonic() + LONGEST_S), _marking.set(marks)
    clock, built = _clock.set(now), chat_limits.built_so_far.set([0])
    try:
        yield
    finally:
        _deadline.reset(deadline)
        _marking.reset(marking)
        _clock.reset(clock)
        chat_limits.built_so_far.reset(built)


@contextmanager
def _following(trace: Trace) -> Iterator[None]:
    before = _trace.set(trace)
    try:
        yield
    finally:
        _trace.reset(before)


@lru_cache(maxsize=64)
def _closing(source: str) -> Template | None:
    """What a template writes after its turns, as a template of its own; see `chat_turns.closing_of`."""
    environment = compiled(source).environment
    found = closing_of(environment.parse(source))
    if found is None:
        return None
    tree = nodes.Template(found, lineno=1)
    tree.set_environment(environment)
    code = environment.compile(tree)
    return Template.from_code(environment, code, environment.make_globals(None))


@lru_cache(maxsize=64)
def compiled(source: str) -> Template:
    """A template, ready to run.

    Raises:
        TemplateError: it is malformed.
    """
    environment = _Sandbox(
        finalize=chat_limits.shown,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters = chat_limits.measured_filters({**environment.filters, "tojson": _to_json})
    environment.filters |= {
        "_watched": _watched,
        "_watched_turns": _watched_turns,
        "_note": _note,
        "_joined": chat_limits.joined,
    }
    del environment.globals["lipsum"]
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
    """Jinja's sandbox, whose loops and calls look at the clock, and where nothing large is built."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})
    concat = staticmethod(chat_limits.concatenated)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        turns = loop_over_turns(source)
        for loop in source.find_all(nodes.For):
            loop.iter = _filtered(loop.iter, "_watched_turns" if loop is turns else "_watched")
        if turns is not None:
            notes = [
                nodes.ExprStmt(_filtered(nodes.Const(is_done, lineno=1), "_note"), lineno=1)
                for is_done in (False, True)
            ]
            turns.body = [notes[0], *turns.body, notes[1]]
        source = _MeasuredJoins().visit(source)
        source.set_environment(self)
        return super()._generate(source, *args, **kwargs)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        _check_time()
        owner = getattr(obj, "__self__", None) if isinstance(obj, MethodType | BuiltinMethodType) else None
        if isinstance(owner, str | bytes | int | float):
            if obj.__name__ == "join":  # what can be gone through once only is kept, to be measured
                args = tuple(list(one) if hasattr(one, "__next__") else one for one in args)
            chat_limits.check_method(owner, obj.__name__, [*args, *kwargs.values()])
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def formatted(*args: Any, **kwargs: Any) -> str:
            chat_limits.check_format(value.__self__, [*args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return formatted

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        chat_limits.check_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)


class _MeasuredJoins(NodeTransformer):
    """Turns ``a ~ b``, which the sandbox cannot intercept, into a call that measures its result."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802  (Jinja looks for it)
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_joined")


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


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


def _watched_turns(values: Iterable[Any]) -> Iterator[Any]:
    return _watched(turns_of(values) if isinstance(values, FollowedMessages) else values)


@pass_context
def _note(_: Context, is_done: bool) -> None:
    """The loop begins with a message, or has done it. With the context, lest Jinja calls it on compiling."""
    if (trace := _trace.get()) is not None:
        trace.between = is_done


def _check_time() -> None:
    if time.monotonic() > _deadline.get():
        raise SecurityError(f"it runs for more than {LONGEST_S:g} seconds")


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
