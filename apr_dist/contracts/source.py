"""YAML text to plain values, strictly: every value remembers its line, a repeated key is an error.

What the keys mean is the business of ``schema``; nothing here knows a contract.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

ValuePath = tuple[str | int, ...]
"""Where a value stands: keys and list positions from the root."""

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class SourceProblem:
    """Text that is not strict YAML, and the line of it."""

    line: int
    text: str


@dataclass(frozen=True)
class Source:
    """A parsed file.

    Attributes:
        value: mappings, lists and scalars as Python has them.
        lines: 1-based line of every value, by its path.
        problems: what is not strict YAML; ``value`` is None when it could not be read at all.
    """

    value: Any
    lines: Mapping[ValuePath, int]
    problems: tuple[SourceProblem, ...]

    def line_of(self, path: ValuePath) -> int:
        """Line of the value at ``path``, or of the nearest thing around it that exists."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def read_source(text: str) -> Source:
    """Parse strictly: safe types only, no repeated key, no alias."""
    try:
        root = yaml.compose(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        return Source(None, {}, (SourceProblem((mark.line + 1) if mark else 1, f"not YAML: {reason}"),))
    if root is None:
        return Source(None, {}, (SourceProblem(1, "the file is empty"),))
    walk = _Walk()
    return Source(walk.value(root, ()), walk.lines, tuple(walk.problems))


class _Walk:
    """Turns nodes into values, writing down lines and problems on the way."""

    def __init__(self) -> None:
        self.lines: dict[ValuePath, int] = {}
        self.problems: list[SourceProblem] = []
        self._constructor = yaml.constructor.SafeConstructor()
        self._seen: set[int] = set()

    def value(self, node: yaml.Node, path: ValuePath) -> Any:
        line = node.start_mark.line + 1
        self.lines[path] = line
        if id(node) in self._seen:
            self.problems.append(SourceProblem(line, "an alias; write the value out"))
            return None
        self._seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        try:
            return self._constructor.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            self.problems.append(SourceProblem(line, f"a value that cannot be read ({error})"))
            return None

    def _mapping(self, node: yaml.MappingNode, path: ValuePath) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(SourceProblem(line, "a key that is not plain text"))
                continue
            key = str(key_node.value)
            if key in found:
                first = self.lines[(*path, key)]
                self.problems.append(
                    SourceProblem(line, f"key {key!r} is given twice (first on line {first})")
                )
                continue
            found[key] = self.value(value_node, (*path, key))
            self.lines[(*path, key)] = line
        return found
