"""JSON and YAML from files: whatever is wrong with a text, it is a ``ValueError`` that says so.

A few kilobytes of brackets drive both parsers beyond the interpreter's stack, which they report as
``RecursionError``: for a reader of files that is one more malformed text, not a defect of the program.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml


def parse_json(text: str | bytes) -> Any:
    """The value that a JSON text holds.

    Raises:
        ValueError: it is not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_yaml(text: str) -> Any:
    """The plain value that a YAML text holds; no tag builds an object.

    Raises:
        ValueError: it is not YAML, or nested too deeply.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def printable(path: Path | str) -> str:
    r"""A path as text that any file and terminal can hold: bytes that are not UTF-8 become ``\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
