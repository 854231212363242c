"""What two ranks need while a file is loaded into them and written back: run under torchrun, reports JSON.

torchrun --nproc_per_node 2 tests/builders/memory_ranks.py MODEL.apr STRATEGY OUTPUT_FOLDER
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apr_dist.apr.reader import AprReader
from apr_dist.model.families import Family
from apr_dist.parallel import runtime as processes
from apr_dist.parallel.gather import save_weights, weight_parts
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.save_group import Exchange
from apr_dist.parallel.sharding import assert_spread, build_decoder
from apr_dist.parallel.weights import draw_weights, load_weights
from builders.sessions import architecture_of


def resident(key: str) -> int:
    """Bytes of ``VmRSS`` or ``VmHWM`` of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = [line for line in lines if line.startswith(key)]
    return int(found.split()[1]) * 1024


def count_from_here(runtime: Runtime) -> int:
    """Let the largest resident set be counted again; returns what is resident now."""
    gc.collect()
    runtime.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def main() -> None:
    model, strategy, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    runtime = processes.start(device="cpu", strategy=strategy, precision="f32", cpu_threads=1, timeout_s=120)
    config = architecture_of(model, Family.LLAMA)
    small = replace(config, num_layers=1, vocab_size=512, intermediate_size=64)
    draw_weights(build_decoder(small, runtime), small, runtime, seed=0)  # what is imported on first use
    before = count_from_here(runtime)
    decoder = build_decoder(config, runtime)
    opened = AprReader(model) if runtime.is_main else None
    load_weights(decoder, opened, runtime)
    report = {"load": resident("VmHWM") - before, **assert_spread(decoder, runtime)}
    before = count_from_here(runtime)
    metadata = opened.metadata if opened else None
    exchange, target = Exchange(runtime), folder / "saved.apr"
    save_weights(weight_parts(decoder, runtime), target, metadata, overwrite=False, exchange=exchange)
    report |= {"save": resident("VmHWM") - before, "strategy": runtime.strategy.value}
    report["device"] = str(runtime.device)
    (folder / f"report-{runtime.rank}.json").write_text(json.dumps(report))
    runtime.barrier()
    processes.shut_down(0)


if __name__ == "__main__":
    main()
