"""What every test sees: the builders on the path, and markers derived from markers."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from builders.runs import Inputs

sys.path.insert(0, str(Path(__file__).parent))


from builders.contracts import register_recorder, tag_falsifiers


def pytest_configure(config: pytest.Config) -> None:
    """Record what each falsifier's tests did, for ``apr-dist contracts status``."""
    register_recorder(config, Path(__file__).resolve().parent.parent)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that is bound to a falsifier, so that ``-m falsifier`` selects them."""
    tag_falsifiers(items)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Tokenizer, shards, architecture and a pretrained model, shared by all workers of this session."""
    root = tmp_path_factory.getbasetemp()
    shared = root.parent if os.environ.get("PYTEST_XDIST_WORKER") else root
    from builders.runs import make_inputs  # noqa: PLC0415  (imports PyTorch; most tests do not need it)

    return make_inputs(shared / "shared")
