"""Which tests carry which falsifiers, read from the text of ``tests/`` without running any of it.

Besides the markers this finds out whether a test goes through an entry point (a command line as a user
has it) by following the names it uses. What pytest really collects is in ``collection``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

DOOR_MODULES = frozenset({"apr_dist.train", "apr_dist.cli"})
"""Importing one of these, or starting it as a process, is going through an entry point."""

_DOOR_TEXTS = frozenset({*DOOR_MODULES, "apr-dist", "apr_dist/train.py", "train.py"})
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Marker:
    """One ``falsifies`` marker on a test.

    Attributes:
        ids: the falsifiers it names, in order.
        line: 1-based line it stands on.
        literal: whether every argument is a plain string.
        case: whether it stands on one parameter case only.
    """

    ids: tuple[str, ...]
    line: int
    literal: bool
    case: bool


@dataclass(frozen=True)
class SuiteTest:
    """One test of the suite.

    Attributes:
        node: its pytest node id without a parameter case.
        file: its file, relative to the repository.
        line: 1-based line of its definition.
        markers: its ``falsifies`` markers, those of its class and file included.
        entry_point: whether it goes through a command line.
        redefined: whether an earlier definition of the same name is lost behind it.
    """

    node: str
    file: Path
    line: int
    markers: tuple[Marker, ...]
    entry_point: bool
    redefined: bool

    @property
    def ids(self) -> tuple[str, ...]:
        """Every falsifier it is bound to, once."""
        return tuple(dict.fromkeys(name for marker in self.markers for name in marker.ids))


def read_tests(root: Path) -> dict[str, SuiteTest]:
    """Every test function under ``root/tests``, by node id. Files that do not parse hold none."""
    folder = root / "tests"
    modules = [
        module for path in sorted(folder.rglob("*.py")) if (module := _Module.read(path, root)) is not None
    ]
    doors = _functions_through_a_door(modules)
    found: dict[str, SuiteTest] = {}
    for module in modules:
        if module.file.name.startswith("test_"):
            for test in module.tests(doors):
                found[test.node] = test
    return found


def by_falsifier(tests: Mapping[str, SuiteTest]) -> dict[str, list[SuiteTest]]:
    """The tests that carry each id."""
    found: dict[str, list[SuiteTest]] = {}
    for test in tests.values():
        for name in test.ids:
            found.setdefault(name, []).append(test)
    return found


@dataclass
class _Module:
    """One parsed file: its functions, and what the names in it stand for."""

    file: Path
    tree: ast.Module
    functions: dict[str, _Function] = field(default_factory=dict)
    origin: dict[str, tuple[str, str]] = field(default_factory=dict)
    constants: dict[str, ast.expr] = field(default_factory=dict)

    @staticmethod
    def read(path: Path, root: Path) -> _Module | None:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            return None
        module = _Module(path.relative_to(root), tree)
        for node in tree.body:
            if isinstance(node, _Function):
                module.functions[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                module.constants[node.targets[0].id] = node.value
        for found in ast.walk(tree):
            if isinstance(found, ast.ImportFrom) and found.module and not found.level:
                for alias in found.names:
                    module.origin[alias.asname or alias.name] = (found.module, alias.name)
        return module

    @property
    def name(self) -> str:
        """The name its neighbours import it by (``tests/`` is on the path)."""
        return ".".join(self.file.with_suffix("").parts[1:])

    def tests(self, doors: set[tuple[str, str]]) -> Iterator[SuiteTest]:
        """Its test functions, module level first, then those of its ``Test`` classes."""
        common = _module_markers(self.tree)
        seen: set[str] = set()
        for owner, function, outer in self._definitions(common):
            node = "::".join([self.file.as_posix(), *owner, function.name])
            through = (
                (self.name, function.name) in doors
                if not owner
                else _reaches(self, _names_used(function), doors)
            )
            yield SuiteTest(
                node=node,
                file=self.file,
                line=function.lineno,
                markers=(*outer, *_markers(function)),
                entry_point=through,
                redefined=node in seen,
            )
            seen.add(node)

    def _definitions(
        self, common: tuple[Marker, ...]
    ) -> Iterator[tuple[list[str], _Function, tuple[Marker, ...]]]:
        for node in self.tree.body:
            if isinstance(node, _Function) and node.name.startswith("test_"):
                yield [], node, common
            elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
                outer = (*common, *_markers(node))
                for inner in node.body:
                    if isinstance(inner, _Function) and inner.name.startswith("test_"):
                        yield [node.name], inner, outer


def _markers(node: _Function | ast.ClassDef) -> tuple[Marker, ...]:
    """Markers among the decorators, those of single parameter cases included."""
    return tuple(
        _marker(call, case=call is not decorator)
        for decorator in node.decorator_list
        for call in ast.walk(decorator)
        if _is_falsifies(call)
    )


def _module_markers(tree: ast.Module) -> tuple[Marker, ...]:
    values = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and "pytestmark" in {getattr(name, "id", None) for name in node.targets}
    ]
    calls = [call for value in values for call in ast.walk(value) if _is_falsifies(call)]
    return tuple(_marker(call, case=False) for call in calls)


def _is_falsifies(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "falsifies"


def _marker(call: ast.AST, *, case: bool) -> Marker:
    assert isinstance(call, ast.Call)
    values = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    texts = [value for value in values if isinstance(value, str)]
    plain = len(texts) == len(call.args) and bool(texts) and not call.keywords
    return Marker(tuple(texts), call.lineno, plain, case)


def _functions_through_a_door(modules: list[_Module]) -> set[tuple[str, str]]:
    """(module, function) of everything that reaches an entry point, found by going round until still."""
    used = {
        (m.name, name): (m, _names_used(function)) for m in modules for name, function in m.functions.items()
    }
    doors: set[tuple[str, str]] = set()
    while True:
        found = {key for key, (module, names) in used.items() if _reaches(module, names, doors)}
        if found <= doors:
            return doors
        doors |= found


def _names_used(function: _Function) -> frozenset[str] | None:
    """Every name a function uses, its fixtures among them; None when it names an entry point itself."""
    names = {argument.arg for argument in function.args.args}
    for statement in function.body:
        for node in ast.walk(statement):
            if _names_a_door(node):
                return None
            if isinstance(node, ast.Name):
                names.add(node.id)
    return frozenset(names)


def _reaches(module: _Module, names: frozenset[str] | None, doors: set[tuple[str, str]]) -> bool:
    return names is None or any(_leads_to_a_door(module, name, doors) for name in names)


def _leads_to_a_door(module: _Module, name: str, doors: set[tuple[str, str]]) -> bool:
    source, original = module.origin.get(name, (module.name, name))
    if source in DOOR_MODULES or f"{source}.{original}" in DOOR_MODULES:
        return True
    if (source, original) in doors or ("conftest", name) in doors:
        return True
    constant = module.constants.get(name)
    return constant is not None and any(_names_a_door(part) for part in ast.walk(constant))


def _names_a_door(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name in DOOR_MODULES for alias in node.names)
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in _DOOR_TEXTS
