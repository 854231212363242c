"""Finds the one place that a mutant changes: an operation inside a function, however it is spelled.

In Python an operation is compared as a syntax tree, so line breaks, quotes, comments and the rest of
the function do not matter. In other files it is compared word by word. Nothing here runs the code.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
KEPT = "..."


@dataclass(frozen=True)
class Edit:
    """Characters ``begin`` to ``end`` of a text, and what takes their place."""

    begin: int
    end: int
    text: str

    def apply(self, source: str) -> str:
        """The text after the edit."""
        return source[: self.begin] + self.text + source[self.end :]


def edits(source: str, suffix: str, scope: str, old: str, new: str) -> list[Edit]:
    """Every place in the scope where ``old`` stands, with the edit that puts ``new`` there.

    ``scope`` is a function, a class or a value by its qualified name, or empty for the whole file. In
    Python ``old`` is an expression, statements (a body written ``...`` is any body, and is kept), an
    argument (``seed=config.seed``) or an entry of a dictionary (``"seed": seed``, ``**kept``).
    """
    if suffix == ".py":
        return list(_python_edits(source, scope, old, new))
    if suffix == ".rs":
        return list(_word_edits(source, *_rust_scope(source, scope), old, new))
    return list(_word_edits(source, 0, len(source), old, new))


def has_scope(source: str, scope: str) -> bool:
    """Whether a Python file defines the function, class or value of this qualified name."""
    return _python_scope(ast.parse(source), scope) is not None


def _python_edits(source: str, scope: str, old: str, new: str) -> Iterator[Edit]:
    tree = ast.parse(source)
    root = _python_scope(tree, scope) if scope else tree
    if root is None:
        return
    starts = _line_starts(source)
    try:
        pattern = ast.parse(old).body
    except SyntaxError:
        for first, last in _entries(root, old):
            yield _span(source, starts, first, last, new)
        return
    for node in (*_expressions(root, pattern), *_arguments(root, pattern)):
        yield _span(source, starts, node, node, new)
    if len(pattern) == 1 and isinstance(pattern[0], ast.Expr):
        return
    for body in _bodies(root):
        for first in range(len(body) - len(pattern) + 1):
            found = body[first : first + len(pattern)]
            if all(_equal(have, want) for have, want in zip(found, pattern, strict=True)):
                yield _statement_edit(source, starts, found, pattern, new)


def _entries(root: ast.AST, old: str) -> Iterator[tuple[ast.AST, ast.AST]]:
    """First and last node of each dictionary entry like the one asked for; ``**x`` has no key."""
    wanted = ast.parse("{" + old + "}").body[0]
    (key,), (value,) = wanted.value.keys, wanted.value.values  # type: ignore[attr-defined]
    for node in _inside(root):
        for name, held in zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ():
            if _shape(name) == _shape(key) and _shape(held) == _shape(value):
                yield name or _Starred(held), held


class _Starred(ast.AST):
    """Where ``**value`` begins: two characters before the value."""

    def __init__(self, value: ast.expr) -> None:
        self.lineno, self.col_offset = value.lineno, value.col_offset - 2


def _expressions(root: ast.AST, pattern: list[ast.stmt]) -> Iterator[ast.AST]:
    """Every expression like the one asked for; the statement, where it is one of its own."""
    if len(pattern) != 1 or not isinstance(pattern[0], ast.Expr):
        return
    wanted = _shape(pattern[0].value)
    whole = {id(node.value): node for node in _inside(root) if isinstance(node, ast.Expr)}
    for node in _inside(root):
        if isinstance(node, ast.expr) and _shape(node) == wanted:
            yield whole.get(id(node), node)


def _arguments(root: ast.AST, pattern: list[ast.stmt]) -> Iterator[ast.keyword]:
    """Every argument of a call that is given like the assignment asked for."""
    if len(pattern) != 1 or not isinstance(pattern[0], ast.Assign):
        return
    wanted = ast.unparse(pattern[0].targets[0]), _shape(pattern[0].value)
    for node in _inside(root):
        if isinstance(node, ast.keyword) and (node.arg, _shape(node.value)) == wanted:
            yield node


def _statement_edit(
    source: str, starts: list[int], found: list[ast.stmt], pattern: list[ast.stmt], new: str
) -> Edit:
    """Replace whole statements; where the body is kept, only the condition in front of it."""
    condition = _kept_condition(pattern)
    if condition is not None and isinstance(found[0], ast.If | ast.While):
        replaced = ast.parse(new).body
        test = _kept_condition(replaced)
        if test is not None:
            return _span(source, starts, found[0].test, found[0].test, ast.unparse(test))
    return _span(source, starts, found[0], found[-1], new)


def _kept_condition(statements: list[ast.stmt]) -> ast.expr | None:
    if (
        len(statements) == 1
        and isinstance(statements[0], ast.If | ast.While)
        and _is_kept(statements[0].body)
    ):
        return statements[0].test
    return None


def _is_kept(body: list[ast.stmt]) -> bool:
    return len(body) == 1 and ast.unparse(body[0]) == KEPT


def _equal(have: ast.stmt, want: ast.stmt) -> bool:
    body = getattr(want, "body", None)
    if body is None or not _is_kept(body):
        return _shape(have) == _shape(want)
    if type(have) is not type(want):
        return False
    left_out = {"body", "orelse", "finalbody", "handlers"}
    fields = [name for name in want._fields if name not in left_out]
    return all(_shape(getattr(have, name)) == _shape(getattr(want, name)) for name in fields)


def _shape(node: object) -> str:
    """A node without its place in the file, and without whether a name is read or written."""
    if isinstance(node, list):
        return "[" + ",".join(_shape(one) for one in node) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    return re.sub(r"(, )?ctx=(Load|Store|Del)\(\)", "", ast.dump(node))


def _python_scope(tree: ast.AST, scope: str) -> ast.AST | None:
    here: ast.AST = tree
    for name in scope.split("."):
        inner = next((one for one in _inside(here) if name in _names(one)), None)
        if inner is None:
            return None
        here = inner
    return ast.Expr(here.value) if isinstance(here, ast.Assign | ast.AnnAssign) and here.value else here


def _names(node: ast.AST) -> set[str]:
    """What a definition or an assignment is called."""
    if isinstance(node, DEFINITIONS):
        return {node.name}
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _inside(root: ast.AST) -> Iterator[ast.AST]:
    """Every node below, but nothing within a formatted string: its parts have no reliable place."""
    for child in ast.iter_child_nodes(root):
        yield child
        if not isinstance(child, ast.JoinedStr):
            yield from _inside(child)


def _bodies(root: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in [root, *_inside(root)]:
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if isinstance(body, list):
                yield body


def _span(source: str, starts: list[int], first: ast.AST, last: ast.AST, new: str) -> Edit:
    begin = _offset(source, starts, first.lineno, first.col_offset)  # type: ignore[attr-defined]
    end = _offset(source, starts, last.end_lineno, last.end_col_offset)  # type: ignore[attr-defined]
    indent = " " * first.col_offset  # type: ignore[attr-defined]
    return Edit(begin, end, new.replace("\n", "\n" + indent) if isinstance(first, ast.stmt) else new)


def _line_starts(source: str) -> list[int]:
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts


def _offset(source: str, starts: list[int], line: int, column: int) -> int:
    """Columns of a syntax tree count UTF-8 bytes; a text counts characters."""
    begin = starts[line - 1]
    text = source[begin : starts[line]]
    return begin + len(text.encode()[:column].decode())


def _rust_scope(source: str, name: str) -> tuple[int, int]:
    """Where a function of a Rust file begins and ends; an empty range when there is none, or several."""
    if not name:
        return 0, len(source)
    found = list(re.finditer(rf"\bfn {re.escape(name)}\b", source))
    if len(found) != 1:
        return 0, 0
    begin = source.find("{", found[0].end())
    depth = 0
    for place in range(begin, len(source)):
        depth += {"{": 1, "}": -1}.get(source[place], 0)
        if depth == 0:
            return found[0].start(), place + 1
    return 0, 0


def _word_edits(source: str, begin: int, end: int, old: str, new: str) -> Iterator[Edit]:
    pattern = r"\s+".join(re.escape(word) for word in old.split())
    for found in re.finditer(pattern, source[begin:end]):
        yield Edit(begin + found.start(), begin + found.end(), new)
