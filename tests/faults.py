"""Faults a run has to survive, many times over; prints the table. ``make faults`` runs it, a few minutes.

Every launch goes through the trainer's entry point in processes forked after the imports. What is asked after
each fault: exit codes, how long the others lived on, whether the newest folder is whole, and whether the run
that goes on from it repeats the uninterrupted run's losses and gradient norms to the last bit.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from builders.runs import Inputs, make_inputs, metrics, newest_whole
from builders.warm_ranks import Hurt, WarmRanks, open_ranks

from apr_dist.errors import ExitCode

STEPS = 4000
"""Longer than any chain of launches gets; part of the learning rate, so the same for all."""


@dataclass
class Tally:
    """What happened to one kind of fault."""

    name: str
    times: int = 0
    lost: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    note: str = ""

    def check(self, good: bool, otherwise: str) -> None:
        """Count a promise that was not kept."""
        if not good:
            self.lost.append(otherwise)

    def row(self) -> str:
        """One line of the table."""
        verdict = "survived" if not self.lost else f"{len(self.lost)} LOST: {self.lost[0][:300]}"
        slowest = f"{self.slowest_s:.1f} s" if self.slowest_s else "-"
        return f"| {self.name} | {self.times} | {verdict} | {slowest} | {self.note} |"


class Bench:
    """Inputs, a server of ranks, and the losses of runs nobody disturbed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        with redirect_stdout(sys.stderr):  # the training of the shared model, and not a part of the table
            self.inputs: Inputs = make_inputs(folder / "shared")
        self.ranks: WarmRanks = open_ranks(folder / "ranks")

    def flags(self, run_dir: Path, *more: str) -> list[str]:
        """A fine-tuning that saves after every step."""
        flags = [*self.inputs.data_flags(), "--init", str(self.inputs.pretrained), "--run-dir", str(run_dir)]
        flags += ["--num-steps", str(STEPS), "--eval-every", "1", "--resume", "auto"]
        flags += ["--evaluation.max-sequences", "2", "--early-stop.patience", str(STEPS), "--lr", "1e-5"]
        return [*flags, "--evaluation.random-sequences", "0", "--target-val-loss", "0.01", *more]

    def reference(self, steps: int, world_size: int, *more: str) -> dict[int, tuple[float, float]]:
        """Loss and norm of each step of a run that nothing happened to."""
        run_dir = self.folder / "-".join(("reference", str(world_size), *more))
        self.ranks.launch(
            [*self.flags(run_dir, *more), "--eval-every", str(steps)],
            world_size=world_size,
            hurt=Hurt(number=signal.SIGTERM, ranks=(0,), after=str(marker(run_dir, steps))),
        )
        return figures(run_dir)


def marker(run_dir: Path, step: int) -> Path:
    """The file that is written when a step folder is whole."""
    return run_dir / "steps" / f"{step:06d}" / "state.json"


def figures(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of every step of a run folder."""
    return {line["step"]: (line["train_loss"], line["grad_norm"]) for line in metrics(run_dir)}


def chain(
    bench: Bench,
    tally: Tally,
    times: int,
    *,
    world_size: int,
    number: int,
    codes: set[int],
    more: Sequence[str] = (),
    plain: Sequence[str] = (),
) -> Tally:
    """Hurt one run again and again, each time going on from what the last fault left.

    It is launched with the flags ``more``, and has to repeat a run with the flags ``plain``.
    """
    run_dir, reached = bench.folder / "-".join(("chain", str(number), str(world_size), *more)), 0
    for _ in range(times):
        who = [(rank,) for rank in range(world_size)] + [tuple(range(world_size))]
        hurt = Hurt(
            number=number,
            ranks=bench.random.choice(who),
            after=str(marker(run_dir, reached + 1)),
            delay_s=bench.random.uniform(0, 0.25),
        )
        ended = bench.ranks.launch(bench.flags(run_dir, *more), world_size=world_size, hurt=hurt)
        tally.times += 1
        tally.slowest_s = max(tally.slowest_s, ended.after_s or 0.0)
        tally.check(set(ended.codes) <= codes, f"codes {ended.codes}: {ended.errors[0][-200:]}")
        tally.check((ended.after_s or 0.0) < 15, f"a rank lived on for {ended.after_s} s")
        whole = newest_whole(run_dir)
        tally.check(whole is not None and int(whole.name) > reached, f"no progress after step {reached}")
        if number == signal.SIGTERM and whole is not None:
            last = max(figures(run_dir))
            tally.check(int(whole.name) == last, f"step {last} was done, step {whole.name} saved")
        reached = reached if whole is None else int(whole.name)
    found, wanted = figures(run_dir), bench.reference(reached, world_size, *plain)
    other = [step for step in range(1, reached + 1) if found.get(step) != wanted.get(step)]
    tally.check(not other, f"step {other[:1]} differs from the uninterrupted run")
    tally.note = f"{reached} steps, loss and norm equal to the uninterrupted run's to the last bit"
    return tally


BF16 = ("--parallel.precision", "bf16")
OFFLOADED: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "f32 weights": ((), ()),
    "split weights": (BF16, (*BF16, "--memory.weights", "split")),
    "8-bit moments": (("--optimizer.state-bits", "8"),) * 2,
    "bf16 weights and gradients": ((*BF16, "--memory.weights", "bf16", "--memory.gradients", "bf16"),) * 2,
}
"""Flags of a run that keeps its state on the device, and of the offloaded one that has its bits."""


def offloaded(bench: Bench, rung: str, times: int) -> Tally:
    """Kill a run whose state is in host memory; the run that goes on repeats one without offload."""
    plain, more = OFFLOADED[rung]
    return chain(
        bench,
        Tally(f"SIGKILL while saving, {rung} offloaded"),
        times,
        world_size=1,
        number=signal.SIGKILL,
        codes={-signal.SIGKILL},
        more=(*more, "--parallel.offload", "optimizer"),
        plain=plain,
    )


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own with little room."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill_up(path: Path, after: Path) -> None:
    """Take all the room that is left on a disk once the file ``after`` is there."""
    deadline = time.monotonic() + 60
    while not after.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 16)):
            pass


def disk_full(bench: Bench, tally: Tally) -> Tally:
    """Somebody else fills the disk while the run saves."""
    with small_disk(bench.folder / "disk", 64) as disk:
        run_dir = disk / "run"
        other = threading.Thread(target=fill_up, args=(disk / "other", marker(run_dir, 2)), daemon=True)
        other.start()
        ended = bench.ranks.launch(bench.flags(run_dir), world_size=1)
        other.join()
        whole = newest_whole(run_dir)
        tally.times += 1
        tally.check(ended.codes == (ExitCode.OUTPUT,), f"codes {ended.codes}: {ended.errors[0][-200:]}")
        tally.check(whole is not None, "no whole folder")
        tally.note = f"exit code {ended.codes[0]}, step {whole.name if whole else '-'} is whole"
    return tally


def read_only(bench: Bench, tally: Tally) -> Tally:
    """The output folder takes no files."""
    with small_disk(bench.folder / "locked", 4) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        ended = bench.ranks.launch(bench.flags(disk / "run"), world_size=2)
        tally.times += 1
        tally.check(set(ended.codes) == {ExitCode.OUTPUT}, f"codes {ended.codes}: {ended.errors[0][-200:]}")
        tally.note = f"exit codes {ended.codes}"
    return tally


def one_without_data(bench: Bench, tally: Tally) -> Tally:
    """One of two machines does not see the shards."""
    run_dir = bench.folder / "no-data"
    lost = {1: {"--dataset": str(bench.folder / "nowhere")}}
    ended = bench.ranks.launch(bench.flags(run_dir), world_size=2, own=lost)
    tally.times += 1
    tally.check(0 not in ended.codes and len(set(ended.codes)) == 1, f"codes {ended.codes}")
    tally.slowest_s = ended.seconds
    tally.note = f"exit codes {ended.codes}"
    return tally


def slow_rank(bench: Bench, tally: Tally, held_s: float) -> Tally:
    """One rank does nothing for a while, then goes on."""
    run_dir = bench.folder / "slow"
    hurt = Hurt(number=signal.SIGSTOP, ranks=(1,), after=str(marker(run_dir, 1)), held_s=held_s)
    flags = [*bench.flags(run_dir), "--num-steps", "40", "--eval-every", "1"]
    ended = bench.ranks.launch(flags, world_size=2, hurt=hurt)
    tally.times += 1
    tally.check(set(ended.codes) == {0}, f"codes {ended.codes}: {ended.errors[0][-200:]}")
    tally.note = f"stopped for {held_s:.0f} s, the run ended with {ended.codes}"
    return tally


def damaged(bench: Bench, tally: Tally, damage: Callable[[Path], object], pattern: str) -> Tally:
    """A file of the newest folder is gone, cut or changed: the run goes on from the folder before."""
    run_dir = bench.folder / f"damaged-{tally.name}"
    flags = [*bench.flags(run_dir), "--checkpoint.keep-last", "3", "--resume-allow", "num_steps"]
    bench.ranks.launch([*flags, "--num-steps", "4"], world_size=1)
    for file in sorted((run_dir / "steps" / "000004").glob(pattern)):
        kept = bench.folder / "kept"
        shutil.copytree(run_dir, kept)
        damage(file)
        ended = bench.ranks.launch([*flags, "--num-steps", "5"], world_size=1)
        tally.times += 1
        tally.check(ended.codes == (0,), f"{file.name}: codes {ended.codes}: {ended.errors[0][-200:]}")
        tally.check(max(figures(run_dir)) == 5, f"{file.name}: the run did not go on")
        shutil.rmtree(run_dir)
        kept.rename(run_dir)
    tally.note = "each file in turn; the folder before was picked"
    return tally


def flip(file: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def main() -> int:
    """Every fault in turn; 1 if a promise was not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs while saving")
    parser.add_argument("--terms", type=int, default=50, help="SIGTERMs to one rank or both")
    parser.add_argument("--slow-s", type=float, default=30, help="how long a rank stands still")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    options = parser.parse_args()
    began, killed, termed = time.perf_counter(), -signal.SIGKILL, {int(ExitCode.TERMINATED)}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.seed)
        rows = [
            lambda: chain(
                bench, Tally("SIGKILL while saving"), options.kills, world_size=1, number=9, codes={killed}
            ),
            *(lambda rung=rung: offloaded(bench, rung, max(2, options.kills // 10)) for rung in OFFLOADED),
            lambda: chain(
                bench, Tally("SIGTERM, two ranks"), options.terms, world_size=2, number=15, codes=termed
            ),
            lambda: one_without_data(bench, Tally("one rank without its data")),
            lambda: slow_rank(bench, Tally("a rank that stands still"), options.slow_s),
            lambda: damaged(bench, Tally("a file missing"), Path.unlink, "*"),
            lambda: damaged(bench, Tally("a file truncated"), lambda file: os.truncate(file, 100), "*"),
            lambda: damaged(bench, Tally("a file with one bit flipped"), flip, "*"),
        ]
        if os.geteuid() == 0:  # only root mounts
            rows += [lambda: disk_full(bench, Tally("disk full"))]
            rows += [lambda: read_only(bench, Tally("read-only output"))]
        print("| fault | times | outcome | slowest end | |\n|---|---|---|---|---|", flush=True)
        done = []
        for row in rows:
            done.append(row())
            print(done[-1].row(), flush=True)
        bench.ranks.close()
    print(f"\n{time.perf_counter() - began:.0f} s")
    return int(any(tally.lost for tally in done))


if __name__ == "__main__":
    sys.exit(main())
