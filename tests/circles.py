"""Refuses a circle between files: of the package by its imports, of the crate by its paths.

    python tests/circles.py [--root DIR]

Every import counts, also one inside a function or for types alone: two files that need each other are one
file. `lint-imports` refuses a layer that looks up. In the crate a file in a folder may use its own parent
(``super::``), because a module and its children are one module in several files.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE, CRATE = "apr_dist", "rust_loader/src"
Arrows = Mapping[str, set[str]]


def main(arguments: list[str] | None = None) -> int:
    """Print every circle; 1 where there is one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    root = parser.parse_args(arguments).root
    found = [*circles(python_arrows(root / PACKAGE)), *circles(rust_arrows(root / CRATE))]
    for circle in found:
        print(f"circle: {' -> '.join(circle)}")
    return int(bool(found))


def python_arrows(package: Path) -> Arrows:
    """The files of the package that each file imports, by their paths below it."""
    names = {_module(path, package): path for path in sorted(package.rglob("*.py"))}
    arrows: dict[str, set[str]] = {}
    for path in names.values():
        here = path.relative_to(package).as_posix()
        found = {names[name] for name in _imported(path, package, names)} - {path}
        arrows[here] = {one.relative_to(package).as_posix() for one in found}
    return arrows


def _module(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(path: Path, package: Path, names: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = path.relative_to(package.parent).parts[: -node.level]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:  # a file of that folder, else something in the file itself
                name = f"{base}.{alias.name}"
                if name in names or base in names:
                    yield name if name in names else base


def rust_arrows(source: Path) -> Arrows:
    """The files of the crate whose paths each file names, by their paths below ``src``."""
    modules = {_rust_module(path, source): path for path in sorted(source.rglob("*.rs"))}
    arrows: dict[str, set[str]] = {}
    for path in modules.values():
        text = re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8"))
        found = {modules[name] for name in _paths(text, modules)} - {path}
        arrows[path.relative_to(source).as_posix()] = {one.relative_to(source).as_posix() for one in found}
    return arrows


def _rust_module(path: Path, source: Path) -> str:
    parts = path.relative_to(source).with_suffix("").parts
    return "::".join(parts[:-1] if parts[-1] in {"mod", "lib"} else parts)


def _paths(text: str, modules: Mapping[str, Path]) -> Iterator[str]:
    """Modules that the text reaches by ``crate::``, also by a list in braces."""
    for tail, listed in re.findall(r"\bcrate::((?:\w+::)*\w*)(?:(?<=::)\{([^;]*?)\})?", text):
        ends = re.split(r"[,{}\s]+", listed) if listed else [""]
        for end in ends:
            parts = [part for part in f"{tail}{end}".split("::") if part]
            while parts and "::".join(parts) not in modules:
                parts.pop()
            if parts:
                yield "::".join(parts)


def circles(arrows: Arrows) -> list[list[str]]:
    """One shortest circle through each group of files that reach each other, closed by its first file."""
    found: list[list[str]] = []
    for start in sorted(arrows):
        if not any(start in circle for circle in found) and (way := _way_back(start, arrows)):
            found.append(way)
    return found


def _way_back(start: str, arrows: Arrows) -> list[str] | None:
    """The shortest way from a file over others to itself; None where there is none."""
    came: dict[str, str] = {}
    waiting = [start]
    for here in waiting:  # grows while it is read: breadth first
        for there in sorted(arrows.get(here, ())):
            if there == start:
                way = [here]
                while way[-1] != start:
                    way.append(came[way[-1]])
                return [*reversed(way), start]
            if there not in came:
                came[there] = here
                waiting.append(there)
    return None


if __name__ == "__main__":
    sys.exit(main())
