"""The table of docs/families.md: what each family can do, read off the tests that show it.

A test that is marked ``shows(CELL, ...)`` and parametrised by ``family`` shows these cells of each of its
families. ``python -m builders.capabilities`` in ``tests/`` prints the table.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Final

from apr_dist.model.families import Family

CELLS: Final = (
    *("trained", "from and to Hugging Face", "from and to GGUF", "generates", "packed documents"),
    *("RoPE beyond its length", "adapters", "recomputation", "memory rungs", "plan"),
    *("DDP", "FSDP2", "ZeRO-3"),
)
MODULES: Final = (
    *("test_family_rows", "test_model_generation", "test_model_packing", "test_model_reference"),
    *("test_adapters_merge", "test_family_capabilities", "test_family_strategies"),
)
"""Where the tests are."""


def shown() -> dict[tuple[str, str], list[str]]:
    """The tests that show each cell, by family and capability."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in MODULES:
        for test in vars(importlib.import_module(name)).values():
            marks = {mark.name: mark for mark in getattr(test, "pytestmark", ())}
            if "shows" in marks:
                for family in _families(test.pytestmark):
                    for cell in marks["shows"].args:
                        found.setdefault((family, cell), []).append(f"{name}.{test.__name__}")
    return found


def _families(marks: list[Any]) -> Iterator[str]:
    """The values of the parameter ``family`` that a test runs with."""
    for mark in marks:
        if mark.name != "parametrize":
            continue
        names = (
            [one.strip() for one in mark.args[0].split(",")]
            if isinstance(mark.args[0], str)
            else mark.args[0]
        )
        if "family" in names:
            for values in mark.args[1]:
                yield str(values if len(names) == 1 else values[list(names).index("family")])


def table() -> str:
    """A row for each family; a cell without a test is empty."""
    cells = shown()
    lines = [f"| family | {' | '.join(CELLS)} |", "|---" * (len(CELLS) + 1) + "|"]
    for family in Family:
        marks = ("yes" if (str(family), cell) in cells else "" for cell in CELLS)
        lines.append(f"| {family} | {' | '.join(marks)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
