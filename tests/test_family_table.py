"""The table of families and capabilities is what the tests show, and an empty cell is refused."""

from __future__ import annotations

from pathlib import Path

from builders.capabilities import CELLS, shown, table

from apr_dist.model.families import Family

PAGE = Path(__file__).parents[1] / "docs" / "families.md"


def test_the_table_of_the_page_is_what_the_tests_show() -> None:
    assert table() in PAGE.read_text(), "run python -m builders.capabilities in tests/ and put the table in"


def test_every_cell_of_every_family_is_shown() -> None:
    """An empty cell would have to be refused by name, and a test named here would have to show that."""
    cells = shown()
    assert {cell for _, cell in cells} == set(CELLS)
    assert [(family, cell) for family in Family for cell in CELLS if (family, cell) not in cells] == []
