"""What every test sees: the builders on the path, and markers derived from markers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that is bound to a falsifier, so that ``-m falsifier`` selects them."""
    for item in items:
        if next(item.iter_markers("falsifies"), None) is not None:
            item.add_marker(pytest.mark.falsifier)
