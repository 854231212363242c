"""Which falsifiers have a mutant, read from the text of ``tests/mutants/`` without running any of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path("tests/mutants")
_CALL = "Change"


def falsifiers_with_a_mutant(root: Path) -> frozenset[str]:
    """The first argument of every ``Change(...)`` under ``root/tests/mutants``, as text.

    It is a plain string, a name that one of those files gives to a string, or a sum of such.
    """
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted((root / FOLDER).glob("*.py"))]
    shared = dict(pair for tree in trees for pair in _named_strings(tree))
    found = set()
    for tree in trees:
        names = shared | dict(_named_strings(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == _CALL and node.args:
                found.add(_text(node.args[0], names))
    return frozenset(text for text in found if text is not None)


def _named_strings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if not isinstance(node, ast.Assign):
            continue
        target, value = node.targets[0], node.value
        several = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
        pairs = zip(target.elts, value.elts, strict=False) if several else [(target, value)]  # type: ignore[attr-defined]
        for name, text in pairs:
            if isinstance(name, ast.Name) and isinstance(text, ast.Constant) and isinstance(text.value, str):
                yield name.id, text.value


def _text(node: ast.expr, names: dict[str, str]) -> str | None:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left, names), _text(node.right, names)
        return None if left is None or right is None else left + right
    if isinstance(node, ast.Name):
        return names.get(node.id)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
