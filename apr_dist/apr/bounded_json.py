"""JSON from strangers: parsed only when its depth, size and number of values are within bounds.

The bounds are checked on the raw bytes before Python builds a single object, so a small file cannot
ask for gigabytes or for a stack without end.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final, NoReturn

import numpy as np

MAX_DEPTH: Final = 128
MAX_CONTAINERS: Final = 100_000
MAX_KEYS: Final = 400_000
MAX_VALUES: Final = 1_000_000
MAX_STRINGS: Final = 1_200_000

# A string, or the rest of the text after a quote that is never closed: a pattern that always matches
# at a quote is never tried again from the next one, so the scan is linear whatever the text.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_object(raw: bytes) -> dict[str, Any]:
    """The object in ``raw``; where a key is repeated, the last one wins.

    Raises:
        ValueError: not UTF-8 JSON, not an object, a number that is not finite, or out of bounds
            (``MAX_DEPTH`` and its neighbours). The text says which.
    """
    _check_bounds(raw)
    try:
        value = json.loads(raw.decode(), parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from error
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__} where an object belongs")
    if _SURROGATE.search(raw):
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate raises UnicodeEncodeError
    return value


def _check_bounds(raw: bytes) -> None:
    marks = np.frombuffer(_outside_strings(raw), np.uint8)
    opening = (marks == ord("[")) | (marks == ord("{"))
    closing = (marks == ord("]")) | (marks == ord("}"))
    counts = (
        ("containers", int(opening.sum()), MAX_CONTAINERS),
        ("containers", int(closing.sum()), MAX_CONTAINERS),
        ("keys", int((marks == ord(":")).sum()), MAX_KEYS),
        ("values", int((marks == ord(",")).sum()), MAX_VALUES),
    )
    for what, count, limit in counts:
        if count > limit:
            raise ValueError(f"{count} {what} (the limit is {limit})")
    brackets = opening.astype(np.int8) - closing.astype(np.int8)
    depth = int(np.cumsum(brackets[brackets != 0], dtype=np.int32).max(initial=0))
    if depth > MAX_DEPTH:
        raise ValueError(f"nested {depth} deep (the limit is {MAX_DEPTH})")


def _outside_strings(raw: bytes) -> bytes:
    """The text without its strings, which are counted on the way."""
    pieces, end = bytearray(), 0
    for count, match in enumerate(_STRING.finditer(raw)):
        if count > MAX_STRINGS:
            raise ValueError(f"more than {MAX_STRINGS} strings")
        pieces += raw[end : match.start()]
        end = match.end()
    return bytes(pieces + raw[end:])


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"the number {text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is out of range")
    return value
