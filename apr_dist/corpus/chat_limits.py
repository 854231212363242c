"""Bounds on what one expression of a chat template may build, asked before anything is built.

A template comes with a model file. Jinja's sandbox keeps it from reaching out; it does not keep
``"x".center(10**9)`` from asking for a gigabyte. Here every operation that can make much of little, because a
number or a second text multiplies what it is given, has a rule for the size of its result. A method or filter
that has no rule, and is not known to be harmless, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from functools import wraps
from string import Formatter
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import str_join

LARGEST = 64 * 2**20
"""Characters, or parts, that one rendering, and any value that it builds, may have."""

ALTOGETHER = 64
"""So many times the largest value may be built in one rendering, in values that may all be kept."""

_BITS = 1 << 16
_DIGITS = 300
_PART = 8
"""Characters' worth of memory that one part of a list takes."""

built_so_far: ContextVar[list[int] | None] = ContextVar("built_so_far", default=None)
"""What one rendering has built, set around it; outside of one nothing is counted."""

_NUMBERS = re.compile(r"\d+")
_CONVERSION = re.compile(r"%(\([^)]*\))?([#0\- +]*(?:\*|\d*)(?:\.(?:\*|\d*))?)[hlL]?.", re.DOTALL)
"""Of ``"%s" % value``: the key and the width of each."""

Sizing = Callable[[Any, Sequence[Any]], int]
"""Size of a result, from what an operation is applied to and its arguments."""


def check_size(size: int) -> None:
    """Count a value of that many characters or parts.

    Raises:
        SecurityError: it is too large, or too much was built already.
    """
    if size > LARGEST:
        raise SecurityError(f"it builds a value of {size:,} characters or parts, of at most {LARGEST:,}")
    built = built_so_far.get()
    if built is not None:
        built[0] += size
        if built[0] > ALTOGETHER * LARGEST:
            raise SecurityError(f"it builds values of more than {ALTOGETHER * LARGEST:,} characters in all")


def printed_size(value: Any, known: dict[int, int] | None = None) -> int:
    """Characters of a value as text; one that occurs in several places is measured once."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 3 + 2
    if not isinstance(value, list | tuple | dict):
        return 32
    known = {} if known is None else known
    if id(value) not in known:
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 2 + sum(2 + printed_size(part, known) for part in parts)
    return known[id(value)]


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Refuse a sum, product, power or format whose result would be too large.

    Raises:
        SecurityError: naming the size.
    """
    if operator == "**":
        if not (_is_small(left, 2**32) and _is_small(right, 64)):
            raise SecurityError("it computes too large a power")
    elif operator == "%" and isinstance(left, str | bytes):
        check_size(_formatted(left, [right]))
    elif operator == "+" and _has_parts(left) and _has_parts(right):
        check_size(_taken(left) + _taken(right))
    elif operator == "*":
        _check_product(left, right)


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > _BITS:
        raise SecurityError("it computes too large a product")
    for one, count in ((left, right), (right, left)):
        if _has_parts(one) and isinstance(count, int):
            check_size(_taken(one) * max(count, 0))


def check_method(owner: Any, name: str, given: Sequence[Any]) -> None:
    """Refuse a call of a method of a text or number whose result would be too large.

    Raises:
        SecurityError: naming the size, or the method that has no rule.
    """
    if name in _HARMLESS_METHODS:
        return
    if name not in _METHODS:
        raise SecurityError(f"the method {name} of {type(owner).__name__} is not for chat templates")
    check_size(_METHODS[name](owner, given))


def check_format(text: str, given: Sequence[Any]) -> None:
    """Refuse ``text.format(...)`` whose result would be too large.

    Raises:
        SecurityError: naming the size.
    """
    fields = list(Formatter().parse(text))
    specs = [spec or "" for _, _, spec, _ in fields]
    if any("{" in spec for spec in specs):
        raise SecurityError("it formats a value with a width that is itself a value")
    widths = sum(int(number) for spec in specs for number in _NUMBERS.findall(spec))
    check_size(len(text) + widths + len(fields) * max(map(printed_size, given), default=0))


def measured_filters(filters: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Filters that check the size of their result first; those that have no rule are left out."""
    return {
        name: _measured(name, function)
        for name, function in filters.items()
        if name in _FILTERS or name in _HARMLESS_FILTERS
    }


def joined(values: Sequence[Any]) -> str:
    """What ``~`` makes of its operands."""
    check_size(printed_size(values))
    return str_join(values)


def concatenated(pieces: Iterable[str]) -> str:
    """The text of a macro, or of a block that is kept in a variable."""
    pieces = list(pieces)
    check_size(sum(map(len, pieces)))
    return "".join(pieces)


def shown(value: Any) -> Any:
    """A value that is to be written, whose text is not too large."""
    if isinstance(value, list | tuple | dict):
        check_size(printed_size(value))
    return value


def _measured(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter with its rule; what Jinja hands it before the value (context, environment) stays first."""
    rule = _FILTERS.get(name)
    before = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def measured(*positional: Any, **named: Any) -> Any:
        value, *given = positional[before:]
        if name in _GATHERING and hasattr(value, "__next__"):
            value = list(value)
        if rule is not None:
            check_size(rule(value, [*given, *named.values()]))
        elif name not in _OF_PARTS:
            shown(value)
        return function(*positional[:before], value, *given, **named)

    return measured


def _has_parts(value: Any) -> bool:
    return isinstance(value, str | bytes | list | tuple)


def _taken(value: Any) -> int:
    """Memory of a text in characters, of a list in as many as its places take."""
    return len(value) * (_PART if isinstance(value, list | tuple) else 1)


def _is_small(value: Any, bound: int) -> bool:
    return isinstance(value, int | float) and abs(value) <= bound


def _reach(given: Sequence[Any], otherwise: int = 0) -> int:
    """The largest number, or length of a text, among arguments."""
    sizes = [abs(one) if isinstance(one, int) else printed_size(one) for one in given]
    return max(sizes, default=otherwise)


def _padded(value: Any, given: Sequence[Any]) -> int:
    return printed_size(value) + _reach(given)


def _expanded(value: Any, given: Sequence[Any]) -> int:
    tabs: int = value.count("\t" if isinstance(value, str) else b"\t")
    return len(value) + tabs * _reach(given, 8)


def _replaced(value: Any, given: Sequence[Any]) -> int:
    if not isinstance(value, bytes):
        value, given = str(shown(value)), [str(shown(one)) for one in given]
    old, new = (*given, value[:0], value[:0])[:2]
    # Named arguments may stand the other way round.
    more: int = max(value.count(one) * len(other) for one, other in ((old, new), (new, old)))
    return len(value) + more


def _glued(values: Any, given: Sequence[Any]) -> int:
    count = len(values) if hasattr(values, "__len__") else 0
    return printed_size(values) + count * max(map(printed_size, given), default=0)


def _parted(value: Any, _: Sequence[Any]) -> int:
    return _PART * len(value) if isinstance(value, str | bytes) else 0


def _formatted(text: Any, given: Sequence[Any]) -> int:
    """Of ``%``."""
    text = text.decode("latin-1") if isinstance(text, bytes) else str(text)
    found = list(_CONVERSION.finditer(text))
    if any("*" in one[2] or "(" in (one[1] or "")[1:] for one in found):
        raise SecurityError("it formats a value with a width that is itself a value")
    widths = sum(int(number) for one in found for number in _NUMBERS.findall(one[2]))
    return len(text) + widths + len(found) * max(map(printed_size, given), default=0)


def _rounded(_: Any, given: Sequence[Any]) -> int:
    return LARGEST + 1 if _reach(given) > _DIGITS else 0


def _summed(values: Any, given: Sequence[Any]) -> int:
    return printed_size(values) if any(isinstance(one, list | tuple) for one in given) else 0


def _wrapped(value: Any, given: Sequence[Any]) -> int:
    return printed_size(value) * (1 + _reach(given, 1))


def _indented(value: Any, given: Sequence[Any]) -> int:
    return printed_size(value) + (str(shown(value)).count("\n") + 1) * _reach(given, 4)


_HARMLESS = """
    as_integer_ratio bit_count bit_length capitalize casefold conjugate count decode encode endswith find
    fromhex hex index is_integer isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric
    isprintable isspace istitle isupper lower lstrip partition removeprefix removesuffix rfind rindex
    rpartition rstrip startswith strip striptags swapcase title unescape upper
"""
_TAKING_LISTS = """
    attr count d default dictsort first groupby items last length map max min reject rejectattr reverse select
    selectattr sort unique
"""
_TAKING_TEXT = """
    abs capitalize e escape filesizeformat float forceescape int lower pprint safe string striptags title trim
    truncate upper urlencode wordcount xmlattr
"""
_HARMLESS_METHODS = frozenset(_HARMLESS.split())
_METHODS: Mapping[str, Sizing] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "to_bytes"), _padded),
    **dict.fromkeys(("split", "rsplit", "splitlines"), _parted),
    "expandtabs": _expanded,
    "replace": _replaced,
    "join": lambda separator, given: _glued(given[0] if given else (), [separator]),
}
_OF_PARTS = frozenset(_TAKING_LISTS.split())
_HARMLESS_FILTERS = _OF_PARTS | frozenset(_TAKING_TEXT.split())
_FILTERS: Mapping[str, Sizing] = {
    **dict.fromkeys(("batch", "slice"), lambda _, given: _PART * _reach(given)),
    "center": _padded,
    "format": _formatted,
    "indent": _indented,
    "join": _glued,
    "list": _parted,
    "replace": _replaced,
    "round": _rounded,
    "sum": _summed,
    **dict.fromkeys(("tojson", "wordwrap"), _wrapped),
}
_GATHERING = frozenset(("batch", "join", "list", "slice", "sum"))
"""Filters that take what can be gone through once only: it is kept, so that it can be measured."""
