"""What every test sees: the builders on the path, and markers derived from markers."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from builders.kernels import KernelCase
    from builders.runs import Inputs
    from builders.warm_ranks import WarmRanks

sys.path.insert(0, str(Path(__file__).parent))


from builders.contracts import register_recorder, tag_falsifiers


def pytest_configure(config: pytest.Config) -> None:
    """Record what each falsifier's tests did, for ``apr-dist contracts status``."""
    register_recorder(config, Path(__file__).resolve().parent.parent)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that is bound to a falsifier, so that ``-m falsifier`` selects them."""
    tag_falsifiers(items)


@pytest.fixture(autouse=True, scope="module")
def _give_back_memory() -> Iterator[None]:
    """A run in this process made it keep what is freed; the next module need not live beside that.

    What is left then stays for good, modules above all: no later collection walks through it again.
    """
    yield
    gc.collect()
    gc.freeze()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Tokenizer, shards, architecture and a pretrained model, shared by all workers of this session."""
    from builders.runs import make_inputs  # noqa: PLC0415  (imports PyTorch; most tests do not need it)

    return make_inputs(shared_folder(tmp_path_factory) / "shared")


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmRanks]:
    """Launches of the trainer on several ranks that cost no start of Python each; one server a worker."""
    from builders.several import HAS_COMPILER  # noqa: PLC0415  (imports PyTorch; most tests do not need it)
    from builders.warm_ranks import open_ranks  # noqa: PLC0415

    server = open_ranks(tmp_path_factory.mktemp("ranks"), deepspeed=HAS_COMPILER)
    yield server
    server.close()


@pytest.fixture(scope="session")
def strategies(inputs: Inputs, ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of finished runs of one, two and four processes under every strategy, shared by all workers."""
    from builders.several import make_runs  # noqa: PLC0415  (imports PyTorch; most tests do not need it)

    return make_runs(inputs, ranks, shared_folder(tmp_path_factory) / "strategies")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for ``kernels`` runs on every set of kernels that this machine has."""
    if "kernels" in metafunc.fixturenames:
        from builders.kernels import CASES  # noqa: PLC0415  (imports PyTorch; most tests do not need it)

        metafunc.parametrize("kernels", CASES, indirect=True)


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Iterator[KernelCase]:
    """A set of kernels, and where it computes."""
    from builders.kernels import kernel_case  # noqa: PLC0415  (imports PyTorch; most tests do not need it)

    with kernel_case(request.param) as case:
        yield case


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this session see."""
    root = factory.getbasetemp()
    return root.parent if os.environ.get("PYTEST_XDIST_WORKER") else root
