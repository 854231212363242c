"""Training runs under every strategy, many in one set of processes: starting Python once saves most time.

torchrun --nproc_per_node 4 tests/builders/several.py RUNS.json REPORT_FOLDER

As a script each rank calls the trainer's front door with each list of flags in ``RUNS.json``; all runs join
one process group. Each rank reports the exit codes, and stops at the first that is not 0.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch.distributed as dist

from apr_dist.parallel.runtime import reset_state
from apr_dist.train import main
from builders.runs import REPOSITORY, once

if TYPE_CHECKING:
    from builders.runs import Inputs

HAS_COMPILER = shutil.which(os.environ.get("CXX", "c++")) is not None
"""Without a C++ compiler DeepSpeed cannot communicate on CPU."""

OFFLOAD, PRECISION, SHARD_SIZE = "--parallel.offload", "--parallel.precision", "--parallel.shard-size"

STRATEGIES: Mapping[int, Mapping[str, tuple[str, ...]]] = {
    1: {"single": ("single", "--micro-batch-size", "2")},
    2: {
        "ddp": ("ddp", "--micro-batch-size", "4"),
        "fsdp2": ("fsdp2", "--micro-batch-size", "2"),
        "shard-grad-op": ("shard-grad-op", "--micro-batch-size", "1"),
        "zero1": ("zero1", "--micro-batch-size", "1"),
        "zero2": ("zero2", "--micro-batch-size", "4"),
        "zero3": ("zero3", "--micro-batch-size", "2"),
        "fsdp2-offload": ("fsdp2", "--micro-batch-size", "2", OFFLOAD, "optimizer+parameters"),
        "zero1-offload": ("zero1", "--micro-batch-size", "4", OFFLOAD, "optimizer"),
        "zero2-offload": ("zero2", "--micro-batch-size", "2", OFFLOAD, "optimizer"),
        "zero3-offload": ("zero3", "--micro-batch-size", "2", OFFLOAD, "optimizer+parameters"),
    },
    4: {
        "ddp": ("ddp", "--micro-batch-size", "1"),
        "fsdp2": ("fsdp2", "--micro-batch-size", "2"),
        "shard-grad-op": ("shard-grad-op", "--micro-batch-size", "2"),
        "hsdp": ("hsdp", SHARD_SIZE, "2", "--micro-batch-size", "1"),
        "zero1": ("zero1", "--micro-batch-size", "2"),
        "zero2": ("zero2", "--micro-batch-size", "1"),
        "zero3": ("zero3", "--micro-batch-size", "2"),
    },
}
"""World size to name to strategy and flags: every strategy, and several splits of the global batch."""

BF16 = ("ddp", "fsdp2", "zero1", "zero3")
"""Strategies that are also run in bf16, on two processes."""

MOVED = {
    1: {"single": (4, "hsdp")},
    4: {"fsdp2": (2, "zero1"), "zero3": (2, "ddp"), "zero1": (2, "fsdp2")},
}
"""World size to strategy to the run of another world size and strategy that it goes on from."""

STEPS, HALF = 20, 10


def make_runs(inputs: Inputs, root: Path) -> Path:
    """Run everything, once for all tests: ``WORLD/NAME`` and ``-resumed``, ``-bf16`` and ``-moved``."""

    def make(folder: Path) -> None:
        for world in (2, 4, 1):
            launch(world, plan(inputs, folder, world), folder)

    return once(root, make)


def plan(inputs: Inputs, folder: Path, world: int) -> list[list[str]]:
    """Flags of every run of one world size."""

    def flags(run: str, strategy: tuple[str, ...], *more: str) -> list[str]:
        given = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(folder / run)]
        given += ["--batch-size", "8", "--num-steps", str(STEPS), "--steps-per-epoch", str(HALF)]
        given += ["--lr", "1e-3", "--warmup-steps", "2", "--checkpoint.keep-last", "9"]
        return [*given, "--target-val-loss", "0.1", "--parallel.strategy", *strategy, *more]

    def saved(run: str) -> str:
        return str(folder / run / "steps" / f"{HALF:06d}")

    runs = []
    for name, strategy in STRATEGIES[world].items():
        if strategy[0].startswith("zero") and not HAS_COMPILER:
            continue
        run = f"{world}/{name}"
        runs.append(flags(run, strategy))
        if world == 2 or name == "hsdp":
            runs.append(flags(f"{run}-resumed", strategy, "--resume", saved(run)))
        if world == 2 and name in BF16:
            runs.append(flags(f"{run}-bf16", strategy, PRECISION, "bf16"))
        if name in MOVED.get(world, {}):
            other_world, other = MOVED[world][name]
            if HAS_COMPILER or not other.startswith("zero"):
                moved = ("--resume", saved(f"{other_world}/{other}"))
                runs.append(flags(f"{run}-moved", strategy, *moved))
    return runs


def launch(world: int, runs: list[list[str]], folder: Path) -> None:
    """Run all of them in ``world`` processes."""
    listed = folder / f"runs-{world}.json"
    listed.write_text(json.dumps(runs))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["TORCH_EXTENSIONS_DIR"] = str(REPOSITORY / ".build" / "torch_extensions")
    command = [sys.executable]
    if world > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(world)]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    done = subprocess.run(
        [*command, __file__, str(listed), str(folder)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def run_all(runs: list[list[str]]) -> list[int]:
    """The exit code of each run, up to the first that is not 0."""
    codes: list[int] = []
    for flags in runs:
        codes.append(main(flags))
        if codes[-1]:
            break
        if dist.is_initialized():
            dist.barrier()
        reset_state()
    return codes


if __name__ == "__main__":
    codes = run_all(json.loads(Path(sys.argv[1]).read_text()))
    ranks = "-".join(os.environ.get(key, "alone") for key in ("WORLD_SIZE", "RANK"))
    (Path(sys.argv[2]) / f"codes-{ranks}.json").write_text(json.dumps(codes))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(max(codes))
