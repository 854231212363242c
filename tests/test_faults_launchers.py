"""Launchers that start ranks again, and two hosts whose link is cut: real processes, real networks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders.faults import free_port, trainers_under
from builders.network import Hosts, why_no_hosts
from builders.runs import REPOSITORY, TRAIN, metrics, newest_whole, verdict
from builders.warm_ranks import WarmRanks

from apr_dist.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from builders.runs import Inputs

STEPS = 80
"""Enough that a rank is there to be killed long after the first save."""


def flags(inputs: Inputs, run_dir: Path, *more: str) -> list[str]:
    given = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(run_dir)]
    given += ["--lr", "1e-4", "--parallel.strategy", "ddp", "--resume", "auto", "--target-val-loss", "0.1"]
    given += ["--num-steps", str(STEPS), "--eval-every", "5", "--early-stop.patience", "99"]
    return [*given, "--evaluation.max-sequences", "2", "--evaluation.random-sequences", "0", *more]


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE"}}
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**clean, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until_saved(run_dir: Path, process: subprocess.Popen[str], *, within_s: float = 150) -> None:
    deadline = time.monotonic() + within_s
    while newest_whole(run_dir) is None:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "nothing was saved"
        time.sleep(0.05)


TORCHRUN = ("torch.distributed.run", "--nproc_per_node", "2", "--max_restarts", "2")
TORCHRUN += ("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2")
ACCELERATE += ("--max_restarts", "2", "--mixed_precision", "no", "--dynamo_backend", "no")


def accelerate() -> tuple[str, ...]:
    """Its own launcher with a port of its own: it meets at a fixed one unless told otherwise."""
    return (*ACCELERATE, "--main_process_port", str(free_port()))


@pytest.fixture(scope="module")
def untouched(inputs: Inputs, ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody touched, of two ranks forked after the imports."""
    folder = tmp_path_factory.mktemp("untouched")
    ended = ranks.launch(flags(inputs, folder / "run"), world_size=2)
    assert ended.codes == (0, 0), ended.errors
    return folder / "run"


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-022")
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate launch"])
def test_a_rank_that_is_killed_is_started_again_and_the_run_is_the_uninterrupted_one(
    launcher: str, untouched: Path, inputs: Inputs, tmp_path: Path
) -> None:
    """kill -9 of rank 1 under a launcher's --max_restarts, against a run that nobody touched."""
    words = TORCHRUN if launcher == "torchrun" else accelerate()
    killed = tmp_path / "killed"
    process = start([sys.executable, "-m", *words, str(TRAIN), *flags(inputs, killed)])
    try:
        wait_until_saved(killed, process)
        victims = [one for one in trainers_under(process) if one.environ().get("RANK") == "1"]
        victims[0].kill()
        said, _ = process.communicate(timeout=200)
    finally:
        end(process)
    assert process.returncode == 0, said
    assert "rank 1 is gone, last seen at step " in said
    assert "resumes after step " in said
    digests = [verdict(run)["facts"]["weights_digest"] for run in (killed, untouched)]
    assert digests[0] == digests[1]
    losses = [[line["train_loss"] for line in metrics(run)] for run in (killed, untouched)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two network namespaces with a cable between them."""
    reason = why_no_hosts()
    if reason:
        pytest.skip(reason)
    with Hosts() as both:
        yield both


def test_two_hosts_train_over_tcp_and_both_end_when_their_link_is_cut(
    hosts: Hosts, inputs: Inputs, tmp_path: Path
) -> None:
    """The recipe of launch/ for two machines; the cable is pulled in the middle of training."""
    run_dir = tmp_path / "run"
    recipe = str(REPOSITORY / "launch" / "two-nodes-torchrun.sh")
    endless = ("--num-steps", "100000", "--eval-every", "20", "--parallel.precision", "f32")
    given = {"INIT": str(inputs.pretrained), "DATA": str(inputs.train.parent), "RUN_DIR": str(run_dir)}
    given |= {"STRATEGY": "fsdp2", "PROCESSES": "1", "MASTER": hosts.address(0)}
    given["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    launchers = []
    try:
        for host in (0, 1):
            more = [*inputs.data_flags(), *endless, "--lr", "1e-4", "--early-stop.patience", "100000"]
            own = {"NODE": str(host), "LOCAL_ADDRESS": hosts.address(host), "RESTARTS": "0"}
            own["GLOO_SOCKET_IFNAME"] = hosts.interface(host)
            launchers.append(start([*hosts.inside(host), "bash", recipe, *more], **given, **own))
        wait_until_saved(run_dir, launchers[0])
        ranks = [one for launcher in launchers for one in trainers_under(launcher)]
        assert len(ranks) == 2
        hosts.cut()
        cut_at = time.monotonic()
        while any(one.is_running() and one.status() != "zombie" for one in ranks):
            assert time.monotonic() - cut_at < 15, "a rank was still there 15 s after the link was cut"
            time.sleep(0.1)
    finally:
        for launcher in launchers:
            end(launcher)
    assert newest_whole(run_dir) is not None
    said = verdict(run_dir)
    assert (said["exit_code"], said["facts"]["failed_rank"]) == (ExitCode.DISTRIBUTED, 1)


def end(process: subprocess.Popen[str]) -> None:
    """Leave neither the launcher nor what it started behind."""
    for rank in trainers_under(process) if process.poll() is None else []:
        rank.kill()
    if process.poll() is None:
        process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def test_without_namespaces_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert why_no_hosts() == "the command ip is not there (Debian: iproute2)"
