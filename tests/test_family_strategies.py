"""Every family trains on two processes, under each kind of strategy, to the weights that one gives.

``make families`` runs it: three strategies of all families in one pair of processes take a minute.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders.family_ranks import trained
from builders.runs import REPOSITORY
from safetensors.torch import load_file

from apr_dist.choices import Strategy
from apr_dist.model.families import Family
from apr_dist.parallel.runtime import reset_state

pytestmark = pytest.mark.skipif(
    "APR_DIST_CONFIGURATIONS" not in os.environ, reason="make families trains every family on two processes"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes trained."""
    folder = tmp_path_factory.mktemp("families")
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(REPOSITORY / ".build" / "torch_extensions")}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    script = [str(Path(__file__).parent / "builders" / "family_ranks.py"), str(folder)]
    done = subprocess.run(
        [*launch, *script], capture_output=True, text=True, timeout=900, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return folder


def assert_equal_to_one_process(family: Family, strategy: Strategy, folder: Path) -> None:
    found = load_file(folder / f"{family}-{strategy}.safetensors")
    expected = trained(family, Strategy.SINGLE)
    reset_state()
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert (found[name] - values).abs().max() < 1e-5, name


@pytest.mark.shows("DDP")
@pytest.mark.parametrize("family", Family)
def test_replicas_of_every_family_train_to_the_weights_of_one_process(family: Family, saved: Path) -> None:
    assert_equal_to_one_process(family, Strategy.DDP, saved)


@pytest.mark.shows("FSDP2")
@pytest.mark.parametrize("family", Family)
def test_shards_of_every_family_train_to_the_weights_of_one_process(family: Family, saved: Path) -> None:
    assert_equal_to_one_process(family, Strategy.FSDP2, saved)


@pytest.mark.shows("ZeRO-3")
@pytest.mark.parametrize("family", Family)
def test_zero_shards_of_every_family_train_to_the_weights_of_one_process(family: Family, saved: Path) -> None:
    assert_equal_to_one_process(family, Strategy.ZERO3, saved)
