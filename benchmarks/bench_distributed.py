"""Start-up time by phase and memory while loading, per strategy, with real processes on this machine.

A model file is written once; each strategy then starts its processes, loads the file, proves the
weights, prepares the optimizer and takes one step. Memory is the largest resident set from before the
network is built to after the weights are proven, beyond the process as it was before; a rank may need
its share, and rank 0 two, the others one of the largest tensors besides. Times are of the slowest rank.

    python benchmarks/bench_distributed.py
    python benchmarks/bench_distributed.py --shape qwen2.5-0.5b --strategies fsdp2 zero3 --processes 4
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

import psutil
import torch

from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.model.config import preset
from apr_dist.model.transformer import Decoder, init_weights
from apr_dist.parallel import runtime as processes
from apr_dist.parallel.engine import prepare
from apr_dist.parallel.sharding import build_decoder
from apr_dist.parallel.weights import draw_weights, load_weights, save_weights
from apr_dist.training.optimizer import build_optimizer

PHASES = ("launch", "import", "join", "build", "load", "prepare", "first step")
MB = 1e6


def resident(key: str) -> int:
    """Bytes of ``VmRSS`` or ``VmHWM`` of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise LookupError(key)


def worker(options: argparse.Namespace) -> None:
    marks = [options.launched, psutil.Process().create_time(), time.time()]
    runtime = processes.start(
        device="cpu", strategy=options.worker, precision="f32", cpu_threads=1, timeout_s=600
    )
    if runtime.strategy.zero_stage:
        import deepspeed  # noqa: PLC0415  (only ZeRO needs it)

        deepspeed.init_distributed(dist_backend="gloo")  # its import and module are not the model's memory
    marks.append(time.time())
    config = preset(options.shape)
    small = replace(config, num_layers=1, vocab_size=512)
    draw_weights(build_decoder(small, runtime), small, runtime, seed=0)  # what is imported on first use
    gc.collect()
    reader = AprReader(options.model, verify="structure") if runtime.is_main else None
    runtime.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident set is counted from here
    before = resident("VmRSS")
    decoder = build_decoder(config, runtime)
    marks.append(time.time())
    load_weights(decoder, reader, runtime)
    marks.append(time.time())
    peak = resident("VmHWM") - before
    optimizer = build_optimizer(decoder, lr=1e-4, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8)
    engine = prepare(decoder, optimizer, runtime, micro_batch=1, grad_clip=1.0)
    marks.append(time.time())
    tokens = torch.randint(config.vocab_size, (1, 65), generator=torch.Generator().manual_seed(runtime.rank))
    engine.accumulate(tokens[:, :-1], tokens[:, 1:], scale=1 / 64, last=True)
    engine.step(lambda _: None)
    marks.append(time.time())
    facts = {
        "phases": dict(zip(PHASES, (b - a for a, b in itertools.pairwise(marks)), strict=True)),
        "load_peak_bytes": peak,
        "shard_bytes": 4 * engine.evidence["shard_elements"][runtime.rank],
        "whole_run_peak_bytes": resident("VmHWM"),
    }
    (options.output / f"{runtime.rank}.json").write_text(json.dumps(facts))
    del engine, optimizer, decoder
    runtime.barrier()
    processes.shut_down(0)


def write_model(path: Path, shape: str) -> tuple[int, int]:
    """Write a model from scratch; returns bytes of all tensors and of the largest."""
    config = preset(shape)
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.to_empty(device="cpu")
    decoder.reset_buffers()
    init_weights(decoder, seed=0)
    save_weights(decoder, path, AprMetadata.from_mapping(config.to_metadata()), overwrite=True)
    sizes = [4 * weight.numel() for weight in decoder.parameters()]
    return sum(sizes), max(sizes)


def launch(options: argparse.Namespace, strategy: str, model: Path, folder: Path) -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable]
    processes = 1 if strategy == "single" else options.processes
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command += [__file__, "--worker", strategy, "--shape", options.shape, "--model", str(model)]
    command += ["--output", str(folder), "--launched", repr(time.time())]
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="smollm2-135m", help="name of a model preset")
    parser.add_argument("--strategies", nargs="+", default=["single", "ddp", "fsdp2", "zero2", "zero3"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    for name, kind in (("--worker", str), ("--model", Path), ("--output", Path), ("--launched", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    with tempfile.TemporaryDirectory() as folder:
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
