"""Training runs under every strategy, many in one set of processes: starting Python once saves most time.

Each rank calls the trainer's entry point with each list of flags in turn; all runs of a world size join one
process group.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from builders.runs import once

if TYPE_CHECKING:
    from builders.runs import Inputs
    from builders.warm_ranks import WarmRanks

HAS_COMPILER = shutil.which(os.environ.get("CXX", "c++")) is not None
"""Without a C++ compiler DeepSpeed cannot communicate on CPU."""

OFFLOAD, PRECISION, SHARD_SIZE = "--parallel.offload", "--parallel.precision", "--parallel.shard-size"
STATE_BITS = ("--optimizer.state-bits", "8")
WITH_Z = ("--compute.z-loss", "1e-2", "--loader.ignored-ids", "200,201,202,203,204,205")

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

Z_LOSS = {1: ("single",), 2: ("ddp", "fsdp2", "zero3")}
"""World size to strategies that are also run with z-loss and with targets that do not count."""

EIGHT_BIT = {1: ("single",), 2: ("ddp", "fsdp2")}
"""World size to strategies that are also run, and resumed, with optimizer state in 8 bits."""

EIGHT_BIT_MOVED = {1: {"single": (2, "fsdp2")}, 4: {"fsdp2": (2, "ddp")}}
"""As `MOVED`, of those."""

STORED = {
    2: {
        "ddp-f32": ("ddp", "--micro-batch-size", "2"),
        "ddp-split": ("ddp", "--micro-batch-size", "2", "--memory.weights", "split"),
        "ddp-offload": (
            *("ddp", "--micro-batch-size", "2", "--memory.weights", "split"),
            *("--parallel.offload", "optimizer"),
        ),
        "ddp-bf16": (
            *("ddp", "--micro-batch-size", "2", "--memory.weights", "bf16"),
            *("--memory.gradients", "bf16"),
        ),
        "fsdp2-f32": ("fsdp2", "--micro-batch-size", "2"),
        "fsdp2-split": ("fsdp2", "--micro-batch-size", "2", "--memory.weights", "split"),
        "fsdp2-split-8bit": (
            *("fsdp2", "--micro-batch-size", "2", "--memory.weights", "split"),
            *("--optimizer.state-bits", "8"),
        ),
        "fsdp2-8bit": ("fsdp2", "--micro-batch-size", "2", "--optimizer.state-bits", "8"),
        "fsdp2-bf16": ("fsdp2", "--micro-batch-size", "2", "--memory.weights", "bf16"),
    }
}
"""World size to name to flags: runs in bf16 arithmetic, with weights stored in several ways."""

LONG = ("ddp-f32", "ddp-split", "ddp-offload", "fsdp2-f32", "fsdp2-split")
"""Of those, the ones of 50 steps; the others take `STEPS`."""

BF16 = ("ddp", "fsdp2", "zero1", "zero3")
"""Strategies that are also run in bf16, on two processes."""

MOVED = {
    1: {"single": (4, "hsdp")},
    4: {"fsdp2": (2, "zero1"), "zero3": (2, "ddp"), "zero1": (2, "fsdp2")},
}
"""World size to strategy to the run of another world size and strategy that it goes on from."""

STEPS, HALF = 20, 10

LIMIT_S = 900.0
"""Longest that all runs of one world size may take, DeepSpeed's compilation included."""


def make_runs(inputs: Inputs, ranks: WarmRanks, root: Path) -> Path:
    """Run everything, once for all tests: ``WORLD/NAME``, ``-resumed``, ``-bf16``, ``-8bit``, ``-moved``."""

    def make(folder: Path) -> None:
        for world in (2, 4, 1):
            ended = ranks.launch_all(plan(inputs, folder, world), world_size=world, limit_s=LIMIT_S)
            assert ended.codes == (0,) * world, [text[-6000:] for text in ended.errors]

    return once(root, make)


def plan(inputs: Inputs, folder: Path, world: int) -> list[list[str]]:
    """Flags of every run of one world size."""
    runs = []
    for name, strategy in STRATEGIES[world].items():
        if strategy[0].startswith("zero") and not HAS_COMPILER:
            continue
        run = f"{world}/{name}"
        runs.append(_flags(inputs, folder / run, strategy))
        if world == 2 or name == "hsdp":
            runs.append(_flags(inputs, folder / f"{run}-resumed", strategy, "--resume", _saved(folder, run)))
        if world == 2 and name in BF16:
            runs.append(_flags(inputs, folder / f"{run}-bf16", strategy, PRECISION, "bf16"))
        if name in MOVED.get(world, {}):
            other_world, other = MOVED[world][name]
            if HAS_COMPILER or not other.startswith("zero"):
                moved = ("--resume", _saved(folder, f"{other_world}/{other}"))
                runs.append(_flags(inputs, folder / f"{run}-moved", strategy, *moved))
    runs += _eight_bit(inputs, folder, world)
    runs += _stored(inputs, folder, world)
    for name in Z_LOSS.get(world, ()):
        if HAS_COMPILER or not name.startswith("zero"):
            runs.append(_flags(inputs, folder / f"{world}/{name}-z", STRATEGIES[world][name], *WITH_Z))
    return runs


def _flags(
    inputs: Inputs, run_dir: Path, strategy: tuple[str, ...], *more: str, steps: int = STEPS
) -> list[str]:
    given = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(run_dir)]
    given += ["--batch-size", "8", "--num-steps", str(steps), "--eval-every", str(HALF)]
    given += ["--lr", "1e-3", "--warmup-steps", "2", "--checkpoint.keep-last", "9"]
    return [*given, "--target-val-loss", "0.1", "--parallel.strategy", *strategy, *more]


def _stored(inputs: Inputs, folder: Path, world: int) -> Iterator[list[str]]:
    for name, strategy in STORED.get(world, {}).items():
        flags = (*strategy, PRECISION, "bf16", "--early-stop.min-evaluations", "99")
        run, steps = f"{world}/stored-{name}", 50 if name in LONG else STEPS
        yield _flags(inputs, folder / run, flags, steps=steps)
        if name in {"ddp-offload", "ddp-bf16", "fsdp2-split", "fsdp2-bf16"}:
            again = ("--resume", str(folder / run / "steps" / f"{steps - HALF:06d}"))
            yield _flags(inputs, folder / f"{run}-resumed", flags, *again, steps=steps)


def _saved(folder: Path, run: str) -> str:
    return str(folder / run / "steps" / f"{HALF:06d}")


def _eight_bit(inputs: Inputs, folder: Path, world: int) -> Iterator[list[str]]:
    for name in EIGHT_BIT.get(world, ()):
        run, strategy = f"{world}/{name}-8bit", (*STRATEGIES[world][name], *STATE_BITS)
        yield _flags(inputs, folder / run, strategy)
        again = ("--resume", _saved(folder, run))
        yield _flags(inputs, folder / f"{run}-resumed", strategy, *again)
    for name, (other_world, other) in EIGHT_BIT_MOVED.get(world, {}).items():
        strategy = (*STRATEGIES[world][name], *STATE_BITS)
        moved = ("--resume", _saved(folder, f"{other_world}/{other}-8bit"))
        yield _flags(inputs, folder / f"{world}/{name}-8bit-moved", strategy, *moved)
