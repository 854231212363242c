"""Start-up by phase, memory while loading and saving, and the stall of a save, with real processes here.

A model file is written once; each strategy then starts its processes and opens a session on the file, which
builds the network, loads and proves the weights and prepares the optimizer, takes steps and saves a step
folder twice: waiting for the write, and in the background while steps go on. Memory is the largest resident
set beyond what stood before the part that is measured: before the network is built, for loading; before the
save that waits, for saving. While loading a rank may need its share, and rank 0 two, the others one of the
largest tensors besides; while saving two of them. Times are of the slowest rank. With ``--overhead`` our
steps alternate with those of a hand-written loop of the same strategy (``strategy_overhead``), and nothing
else is measured.

    python benchmarks/bench_distributed.py
    python benchmarks/bench_distributed.py --shape qwen2.5-0.5b --strategies fsdp2 zero3 --processes 4
    python benchmarks/bench_distributed.py --overhead
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import strategy_overhead
import torch

from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.config.sections import CheckpointSection
from apr_dist.model.config import TransformerConfig, preset
from apr_dist.parallel import runtime as processes
from apr_dist.parallel.gather import save_weights, weight_parts
from apr_dist.parallel.save_group import Exchange
from apr_dist.parallel.sharding import build_decoder
from apr_dist.parallel.weights import draw_weights
from apr_dist.runs.progress import Evaluation, Progress
from apr_dist.runs.saving import Saver
from apr_dist.training.efficiency import process_age_s
from apr_dist.training.library import without_gates
from apr_dist.training.session import Session

PHASES = ("launch", "import", "join", "load", "prepare", "first step")
STRATEGIES = ["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
MB = 1e6


def resident(key: str) -> int:
    """Bytes of ``VmRSS`` or ``VmHWM`` of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise LookupError(key)


class Measured(Session):
    """A session that notes when its parts are there, and the memory that its weights needed on their way."""

    def __init__(self, marks: list[float], config: TransformerConfig, **settings: Any) -> None:
        self.marks, self._shape, self.load_peak = marks, config, 0
        super().__init__(*without_gates(config, **settings))

    def _open_weights(self, *given: Any, **named: Any) -> None:
        self.marks.append(time.time())
        if self.runtime.strategy.zero_stage:
            import deepspeed  # noqa: PLC0415  (only ZeRO needs it)

            deepspeed.init_distributed(dist_backend="gloo")  # its import and module are not the model's
        small = replace(self._shape, num_layers=1, vocab_size=512)
        draw_weights(build_decoder(small, self.runtime), small, self.runtime, seed=0)  # imports of first use
        before = count_from_here(self)
        super()._open_weights(*given, **named)
        self.marks.append(time.time())
        self.load_peak = resident("VmHWM") - before

    def _open_engine(self) -> None:
        super()._open_engine()
        self.marks.append(time.time())


def count_from_here(session: Session) -> int:
    """Let the largest resident set be counted again; returns what is resident now."""
    gc.collect()
    session.runtime.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def worker(options: argparse.Namespace) -> None:
    marks = [options.launched, time.time() - process_age_s(), time.time()]
    config, world_size = preset(options.shape), int(os.environ.get("WORLD_SIZE", "1"))
    first = os.environ.get("RANK", "0") == "0"
    rows = torch.randint(config.vocab_size, (world_size, 65), generator=torch.Generator().manual_seed(0))
    session = Measured(
        marks,
        config,
        reader=AprReader(options.model, verify="structure") if first else None,
        batches=itertools.repeat(rows),
        init=str(options.model),
        run_dir=str(options.output / "run"),
        batch_size=world_size,
        seq_length=64,
        device="cpu",
        parallel={"strategy": options.worker, "cpu_threads": 1, "timeout_s": 600},
    )
    one_step(session)
    marks.append(time.time())
    facts = {
        **measure_saves(session),
        "phases": dict(zip(PHASES, (b - a for a, b in itertools.pairwise(marks)), strict=True)),
        "load_peak_bytes": session.load_peak,
        "shard_bytes": 4 * session.engine.evidence["shard_elements"][session.runtime.rank],
        "whole_run_peak_bytes": resident("VmHWM"),
    }
    (options.output / f"{session.runtime.rank}.json").write_text(json.dumps(facts))
    session.close()
    session.runtime.barrier()
    processes.shut_down(0)


def one_step(session: Session) -> float:
    """One step of one micro-batch; seconds."""
    began, step = time.perf_counter(), session.progress.step
    session.stepper.take(step, compare=False, more=True)
    session.stepper.read()
    session.progress.step += 1
    return time.perf_counter() - began


def measure_saves(session: Session) -> dict[str, Any]:
    """Seconds of a save that waits, of one that does not, and of steps with and without it beside them."""
    found: dict[str, Any] = {"steps_alone_s": [one_step(session) for _ in range(4)][1:]}
    runtime, start, run = session.runtime, session.start, session.run
    for step, background in ((1, False), (2, True)):
        checkpoint = CheckpointSection(background=background)
        config = session.config.model_copy(update={"checkpoint": checkpoint})
        saver = Saver(config, runtime, start, run, Exchange(runtime), lambda _: None)
        before, began = count_from_here(session), time.perf_counter()
        evaluated = [
            Evaluation(loss=1.0, tokens=1, wall_s=0.0)
        ]  # a save names one; its value is of no matter
        saver.save(session.model, session.engine.optimizer, Progress(step=step, evaluations=evaluated))
        name = "background" if background else "waiting"
        found[f"{name}_stall_s"] = time.perf_counter() - began
        if background:
            found["steps_beside_s"] = [one_step(session) for _ in range(3)]
        saver.finish()
        found[f"{name}_write_s"] = time.perf_counter() - began
        found[f"{name}_peak_bytes"] = resident("VmHWM") - before
    return found


def write_model(path: Path, shape: str) -> tuple[int, int]:
    """Write a model from scratch; returns bytes of all tensors and of the largest."""
    config = preset(shape)
    with Session(*without_gates(config, device="cpu", parallel={"cpu_threads": 1})) as session:
        metadata, exchange = AprMetadata.from_mapping(config.to_metadata()), Exchange(session.runtime)
        save_weights(
            weight_parts(session.model, session.runtime), path, metadata, overwrite=True, exchange=exchange
        )
        sizes = [4 * weight.numel() for weight in session.model.parameters()]
    return sum(sizes), max(sizes)


def launch(options: argparse.Namespace, strategy: str, model: Path, folder: Path) -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable]
    processes = 1 if strategy == "single" else options.processes
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command += [__file__, "--worker", strategy, "--shape", options.shape, "--model", str(model)]
    command += ["--output", str(folder), "--launched", repr(time.time()), "--steps", str(options.steps)]
    command += ["--overhead"] * options.overhead
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{strategy} failed:\n{done.stderr[-3000:]}")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def report(results: dict[str, list[list[dict[str, Any]]]], largest: int) -> None:
    width = max(map(len, results)) + 2
    print("\nseconds of the slowest rank, median of the runs")
    print(" " * width + "".join(f"{phase:>11}" for phase in PHASES) + f"{'all':>11}")
    for strategy, runs in results.items():
        medians = [
            statistics.median(max(rank["phases"][phase] for rank in run) for run in runs) for phase in PHASES
        ]
        print(f"{strategy:{width}}" + "".join(f"{value:11.2f}" for value in [*medians, sum(medians)]))
    print("\nMB beyond the bare process while building, loading and proving, largest of the runs")
    print(f"{'':{width}}{'share':>9}{'rank 0':>9}{'allowed':>9}{'others':>9}{'allowed':>9}")
    for strategy, runs in results.items():
        share = runs[0][0]["shard_bytes"]
        row = [share, max(run[0]["load_peak_bytes"] for run in runs), share + 2 * largest]
        if len(runs[0]) > 1:
            row.append(max(rank["load_peak_bytes"] for run in runs for rank in run[1:]))
            row.append(share + largest)
        print(f"{strategy:{width}}" + "".join(f"{value / MB:9.0f}" for value in row))
    report_saves(results, largest, width)


def report_saves(results: dict[str, list[list[dict[str, Any]]]], largest: int, width: int) -> None:
    def slowest(runs: list[list[dict[str, Any]]], key: str) -> float:
        return statistics.median(max(rank[key] for rank in run) for run in runs)

    def slowest_step(runs: list[list[dict[str, Any]]], key: str) -> float:
        return statistics.median(max(map(statistics.median, (rank[key] for rank in run))) for run in runs)

    def most(runs: list[list[dict[str, Any]]], key: str, ranks: slice) -> float:
        return max((rank[key] for run in runs for rank in run[ranks]), default=0) / MB

    columns = ("stall", "in background", "whole write", "step alone", "step beside")
    print("\nsaving a step folder: seconds of the slowest rank, medians")
    print(" " * width + "".join(f"{column:>15}" for column in columns))
    for strategy, runs in results.items():
        row = [slowest(runs, key) for key in ("waiting_stall_s", "background_stall_s", "background_write_s")]
        row += [slowest_step(runs, key) for key in ("steps_alone_s", "steps_beside_s")]
        print(f"{strategy:{width}}" + "".join(f"{value:15.2f}" for value in row))
    print(
        "\nMB beyond the training state while saving, largest of the runs; in the background with the copies"
    )
    columns = ("waiting: rank 0", "others", "allowed", "background: rank 0", "others")
    print(" " * width + "".join(f"{column:>20}" for column in columns))
    first, others = slice(0, 1), slice(1, None)
    for strategy, runs in results.items():
        row = [most(runs, "waiting_peak_bytes", first), most(runs, "waiting_peak_bytes", others)]
        row += [2 * largest / MB]
        row += [most(runs, "background_peak_bytes", ranks) for ranks in (first, others)]
        print(f"{strategy:{width}}" + "".join(f"{value:20.0f}" for value in row))


def report_overhead(options: argparse.Namespace, folder: Path) -> None:
    print("seconds of a step of the slowest rank, medians; ours over the other: median and quartiles")
    print(f"{'':10}{'ours':>8}{'plain':>8}{'ratio':>8}{'quartiles':>16}{'wanted':>8}")
    for strategy in options.strategies:
        ranks = launch(options, strategy, Path("-"), folder / strategy)
        ours, plain, ratios = strategy_overhead.ratios(ranks)
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{strategy:10}{statistics.median(ours):8.3f}{statistics.median(plain):8.3f}{middle:8.3f}"
            f"{f'{low:.3f} to {high:.3f}':>16}{'1.03':>8}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="smollm2-135m", help="name of a model preset")
    parser.add_argument("--strategies", nargs="+", help="all that are measured, without it")
    parser.add_argument("--overhead", action="store_true", help="compare steps with a hand-written loop")
    parser.add_argument("--steps", type=int, default=16, help="pairs of steps with --overhead")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    for name, kind in (("--worker", str), ("--model", Path), ("--output", Path), ("--launched", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        (strategy_overhead.worker if options.overhead else worker)(options)
        return
    compared = ["ddp", "fsdp2"]
    options.strategies = options.strategies or (compared if options.overhead else STRATEGIES)
    if options.overhead and not set(options.strategies) <= set(compared):
        parser.error(f"--overhead compares {' and '.join(compared)}")
    with tempfile.TemporaryDirectory() as folder:
        if options.overhead:
            report_overhead(options, Path(folder))
            return
        model = Path(folder) / "model.apr"
        total, largest = write_model(model, options.shape)
        print(f"{options.shape}: {total / MB:.0f} MB in f32, largest tensor {largest / MB:.0f} MB,", end=" ")
        print(f"{options.processes} processes of one thread, {options.repeats} run(s) each")
        results: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in options.strategies}
        for repeat in range(options.repeats):
            for strategy in options.strategies:
                results[strategy].append(
                    launch(options, strategy, model, Path(folder) / f"{strategy}{repeat}")
                )
    report(results, largest)
    if options.json:
        facts = {"shape": options.shape, "bytes": total, "largest_tensor_bytes": largest, "runs": results}
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
