"""A run folder that is not the same for every rank: refused before training, naming who sees another."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders.faults import launch
from builders.files import open_folder
from builders.runs import TRAIN
from builders.warm_ranks import Ended, WarmRanks

from apr_dist.errors import ExitCode

if TYPE_CHECKING:
    from builders.runs import Inputs

ONE_FOLDER = "FALSIFY-APR-DIST-DISTRIBUTED-023"


def flags(inputs: Inputs, run_dir: Path, *more: str) -> list[str]:
    given = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(run_dir)]
    given += ["--num-steps", "2", "--eval-every", "1", "--lr", "1e-4", "--target-val-loss", "0.1"]
    return [*given, "--evaluation.random-sequences", "0", *more]


def assert_refused(ended: Ended, rank: int, what: str) -> None:
    assert ended.codes == (ExitCode.OUTPUT,) * len(ended.codes), ended.errors
    said = [line for text in ended.errors for line in text.splitlines() if line.startswith("error")]
    assert len(said) == 1, said
    assert f"[{ONE_FOLDER}]" in said[0]
    assert f"rank {rank} on host {os.uname().nodename} {what}" in said[0]


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-023")
def test_a_rank_with_another_run_folder_stops_all_and_is_named(
    inputs: Inputs, ranks: WarmRanks, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    own = {2: {"--run-dir": str(other)}}
    ended = ranks.launch(flags(inputs, tmp_path / "run", "--batch-size", "6"), world_size=3, own=own)
    assert_refused(ended, 2, f"does not find in {other} what rank 0 wrote there")
    assert list(tmp_path.iterdir()) == [], "neither a folder nor a word is left"


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-023")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a rank another user")
def test_a_rank_that_may_not_write_in_the_run_folder_stops_all_and_is_named(
    inputs: Inputs, ranks: WarmRanks
) -> None:
    """As an NFS export that is written by one machine and only read by another."""
    with open_folder() as folder:
        run_dir = folder / "run"
        run_dir.mkdir(mode=0o755)
        ended = ranks.launch(flags(inputs, run_dir), world_size=2, unprivileged=[1])
        assert_refused(ended, 1, f"cannot write in {run_dir} (Permission denied)")


def namespaces_are_allowed() -> bool:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    return tried.returncode == 0


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-023")
@pytest.mark.skipif(not namespaces_are_allowed(), reason="mount namespaces are not allowed here")
def test_another_machine_s_disk_under_the_same_path_is_not_the_run_folder(
    inputs: Inputs, tmp_path: Path
) -> None:
    """Rank 1 lives in a mount namespace where an empty disk of its own lies at the same place."""
    shared = tmp_path / "shared"
    shared.mkdir()
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys\n"
        f"command = [sys.executable, {str(TRAIN)!r}, *sys.argv[1:]]\n"
        "if os.environ['RANK'] == '1':\n"
        f'    mount = \'mount -t tmpfs tmpfs "$0" && exec "$@"\'\n'
        f"    command = ['unshare', '--mount', 'sh', '-c', mount, {str(shared)!r}, *command]\n"
        "os.execvp(command[0], command)\n"
    )
    started = launch(*flags(inputs, shared / "run"), script=script)
    assert started.codes(within_s=120) == [ExitCode.OUTPUT, ExitCode.OUTPUT]
    said = started.text(0)
    assert f"[{ONE_FOLDER}]" in said
    assert "rank 1 on host" in said
    assert "error" not in started.text(1)
    assert list(shared.iterdir()) == []


def test_ranks_that_see_one_folder_leave_no_word_in_it(
    inputs: Inputs, ranks: WarmRanks, tmp_path: Path
) -> None:
    ended = ranks.launch(flags(inputs, tmp_path / "run"), world_size=2)
    assert ended.codes == (0, 0), ended.errors
    assert [path.name for path in (tmp_path / "run").glob(".*")] == []
