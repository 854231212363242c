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
        ValueError: it is not YAML, gives a key twice, or is nested too deeply.
    """
    try:
        return yaml.load(text, _EachKeyOnce)  # noqa: S506  (a safe loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


class _EachKeyOnce(yaml.SafeLoader):
    """The safe loader, which alone would let the last of two equal keys win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node, whose keys differ; what ``<<`` merges in may be overridden."""
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def printable(path: Path | str) -> str:
    r"""A path as text that any file and terminal can hold: bytes that are not UTF-8 become ``\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
