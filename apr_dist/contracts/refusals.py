"""Every refusal the code can utter, read from its text: what is wrong, what was expected, what to do.

A call ``SomeError("...", expected=..., remedy=..., falsifier=ID)`` is found wherever it stands; the values
inside its texts appear as names between pointed brackets. Nothing is imported or run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from apr_dist import errors


@dataclass(frozen=True)
class Refusal:
    """One place where an error with an id is made.

    Attributes:
        kind: name of the exception.
        exit_code: name of its exit code.
        what: its first sentence.
        expected: what it says would have been right, or nothing.
        remedy: what it says to do, or nothing.
    """

    kind: str
    exit_code: str
    what: str
    expected: str
    remedy: str


def refusals(package: Path) -> Mapping[str, list[Refusal]]:
    """Falsifier id to the refusals that carry it, in the order of files and lines.

    Args:
        package: the folder of the package, in a checkout or installed.
    """
    paths = sorted(package.rglob("*.py"))
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    own = {_module(path, package.parent): dict(_constants(tree)) for path, tree in trees.items()}
    found: dict[str, list[Refusal]] = {}
    for path, tree in trees.items():
        known = {**dict(_imported(tree, own)), **own[_module(path, package.parent)]}
        for call in ast.walk(tree):
            if isinstance(call, ast.Call):
                for falsifier, refusal in _read(call, known):
                    if refusal not in found.setdefault(falsifier, []):
                        found[falsifier].append(refusal)
    return found


def _module(path: Path, folder: Path) -> str:
    return ".".join(path.relative_to(folder).with_suffix("").parts)


def _imported(tree: ast.Module, constants: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    """Constants of other files by the name they have here: ``NAME`` or ``room.NAME``."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        for alias in node.names:
            name = alias.asname or alias.name
            if alias.name in constants.get(node.module, {}):
                yield name, constants[node.module][alias.name]
            for inner, value in constants.get(f"{node.module}.{alias.name}", {}).items():
                yield f"{name}.{inner}", value


def _constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        value = getattr(node, "value", None)
        for target in targets:
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            values = value.elts if isinstance(value, ast.Tuple) else [value]
            for name, one in zip(names, values, strict=False):
                if (
                    isinstance(name, ast.Name)
                    and isinstance(one, ast.Constant)
                    and isinstance(one.value, str)
                ):
                    yield name.id, one.value


def _read(call: ast.Call, known: Mapping[str, str]) -> Iterator[tuple[str, Refusal]]:
    arguments = {one.arg: one.value for one in call.keywords}
    kind = getattr(errors, getattr(call.func, "id", ""), None)
    if kind is None or "falsifier" not in arguments or not call.args:
        return
    refusal = Refusal(
        kind=kind.__name__,
        exit_code=kind.exit_code.name,
        what=_text(call.args[0], known),
        expected=_text(arguments.get("expected"), known),
        remedy=_text(arguments.get("remedy"), known),
    )
    for identifier in _ids(arguments["falsifier"], known):
        yield identifier, refusal


def judged(package: Path) -> Mapping[str, list[tuple[str, str]]]:
    """Falsifier id to the gates of a verdict that carry it: what each is called, and what it requires."""
    found: dict[str, list[tuple[str, str]]] = {}
    tree = ast.parse((package / "gates" / "losses.py").read_text(encoding="utf-8"))
    constants = dict(_constants(tree))
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        known = {**constants, **dict(_locals(function, constants))}
        for call in ast.walk(function):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("GateResult", "_advisory"):
                identified, gate, _, required, *_ = call.args
                for identifier in _ids(identified, known):
                    found.setdefault(identifier, []).append((_text(gate, known), _text(required, known)))
    return found


def _locals(function: ast.FunctionDef, known: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Texts that a function puts together under a name, before it uses them."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=True))
            else:
                pairs = [(target, value)]
            for name, text in pairs:
                if isinstance(name, ast.Name) and isinstance(text, ast.JoinedStr | ast.Constant):
                    yield name.id, _text(text, known)


def _ids(node: ast.expr, known: Mapping[str, str]) -> Iterator[str]:
    """An id stands there itself, under a constant's name, or in both arms of a choice."""
    if isinstance(node, ast.IfExp):
        yield from _ids(node.body, known)
        yield from _ids(node.orelse, known)
    else:
        text = _text(node, known)
        if text.startswith(("FALSIFY-", "INV-", "GATE-")):
            yield text


def _text(node: ast.expr | None, known: Mapping[str, str]) -> str:
    """A text as the code has it, with names for what is only known when it is uttered."""
    match node:
        case None | ast.Constant(value=None):
            text = ""
        case ast.Constant(value=value) | ast.FormattedValue(value=ast.Constant(value=value)):
            text = str(value)
        case ast.JoinedStr():
            text = "".join(_text(part, known) for part in node.values)
        case ast.FormattedValue():
            text = known.get(ast.unparse(node.value), f"<{_name(node.value)}>")
        case ast.BinOp():
            text = _text(node.left, known) + _text(node.right, known)
        case ast.IfExp():
            arms = [_text(node.body, known), _text(node.orelse, known)]
            text = " / ".join(arm for arm in arms if arm)
        case _:
            text = known.get(ast.unparse(node), f"<{_name(node)}>")
    return text


_CALLED = {"len": "number", "join": "names", "max": "number", "repr": "", "str": "", "sorted": "names"}


def _name(node: ast.expr) -> str:
    """What to call a value in a sentence: the last name it is made of."""
    if isinstance(node, ast.Call):
        called = getattr(node.func, "id", getattr(node.func, "attr", ""))
        word = _CALLED.get(called, called)
        return word.strip("_").replace("_", " ") or _name(node.args[0])
    names = [
        one.attr if isinstance(one, ast.Attribute) else one.id
        for one in ast.walk(node)
        if isinstance(one, ast.Attribute | ast.Name)
    ]
    return names[0].strip("_").replace("_", " ") if names else "value"
