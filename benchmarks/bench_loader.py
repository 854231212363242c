"""The loader beside other ways to get the same batches, on the same machine and data, in one run.

Sections: ``throughput`` (hot, back to back), ``handover`` (after 5 ms of think time, sleeping or in a busy
Python loop), ``cold`` (page cache dropped for the shards), ``start`` (first batch, seek and memory with a
sparse data set of a trillion tokens in 100,000 shards, which takes no disk space and is removed).
Every way takes its turn in every round, in rotating order; figures are the median over rounds with
minimum and maximum. On a machine that others use, the processor time of a batch says more than its wall time;
that of worker processes is not in it. ``litdata`` and ``mosaicml-streaming`` take part where installed.

    python benchmarks/bench_loader.py [--sections throughput handover cold start] [--rounds 5]
        [--shards 20] [--seconds 0.5] [--folder DIR] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loader_rivals import BATCH, WIDTH, BareGather, Batches, rivals
from loader_start import Table, loader, start

from apr_dist.data.manifest import Manifest, Shard

TOKENS = BATCH * WIDTH
SHARD_TOKENS = 5_000_000
STEP_MS = 126.0  # one step of 0.5 B parameters on an H100, (8, 2049): 130,000 tokens/s


def make_data(folder: Path, shards: int) -> Manifest:
    """``shards`` shards of random ids below 151,936."""
    generator = np.random.default_rng(1)
    entries = []
    for index in range(shards):
        path = folder / f"shard-{index:05d}.bin"
        if not path.is_file():
            generator.integers(151_936, size=SHARD_TOKENS, dtype=np.uint32).tofile(path)
        entries.append(Shard(file=path.name, tokens=SHARD_TOKENS, bytes=SHARD_TOKENS * 4))
    return Manifest(folder=folder, shards=tuple(entries), vocab_size=151_936, tokenizer=None)


def ours(manifest: Manifest) -> dict[str, Callable[[], Batches]]:
    ways: dict[str, dict[str, Any]] = {
        "apr-dist, block (views, no copy)": {"shuffle": "block"},
        "apr-dist, sequence, int32": {},
        "apr-dist, sequence, int64": {"dtype": torch.int64},
        "apr-dist, sequence, no thread": {"prefetch_batches": 0},
        "apr-dist, sequence, pread": {"access": "pread"},
    }
    return {name: lambda options=options: iter(loader(manifest, **options)) for name, options in ways.items()}


def drop_cache(folder: Path) -> None:
    os.sync()
    for path in folder.glob("shard-*.bin"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_in(folder: Path) -> None:
    """Bring the shards back into the page cache by ordinary reading."""
    for path in folder.glob("shard-*.bin"):
        path.read_bytes()


def rotated(names: list[str], by: int) -> list[str]:
    turned = names[by % len(names) :] + names[: by % len(names)]
    return turned if by % 2 == 0 else turned[::-1]


@dataclass(frozen=True)
class Cost:
    """What one batch took: wall time, and processor time of all threads of this process (not of workers)."""

    wall_us: float
    processor_us: float


def cost_of(work: Callable[[], int]) -> Cost:
    """Cost of a batch of ``work``, which returns how many it made."""
    wall, processor = time.perf_counter(), time.process_time()
    batches = work()
    spent = time.process_time() - processor
    return Cost((time.perf_counter() - wall) / batches * 1e6, spent / batches * 1e6)


def taken_for(batches: Batches, seconds: float) -> int:
    count, until = 0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        for _ in range(10):
            next(batches)
        count += 10
    return count


def warm(batches: Batches, manifest: Manifest) -> None:
    """Touch every page once, so that no way pays for first faults."""
    for _ in range(sum(shard.tokens for shard in manifest.shards) // TOKENS):
        next(batches)


def throughput(manifest: Manifest, rounds: int, seconds: float) -> tuple[Table, dict[str, float]]:
    """Million tokens per second, hot and back to back; and the median processor time of a batch in us."""
    read_in(manifest.folder)
    opened = {name: way() for name, way in {**ours(manifest), **rivals(manifest.folder)}.items()}
    for name in ours(manifest):
        warm(opened[name], manifest)
    one = loader(manifest)
    bare = BareGather(manifest.folder, one._stream.open().locate(0, one.sequences_per_epoch // BATCH * BATCH))
    work: dict[str, Callable[[], int]] = {
        name: lambda batches=batches: taken_for(batches, seconds) for name, batches in opened.items()
    }
    work |= {f"C gather, int{32 << wide}": lambda wide=wide: bare.run(wide=wide) for wide in (False, True)}
    for once in work.values():
        once()
    table: Table = {name: [] for name in work}
    processor: Table = {name: [] for name in work}
    for number in range(rounds):
        for name in rotated(list(work), number):
            cost = cost_of(work[name])
            table[name].append(TOKENS / cost.wall_us)
            processor[name].append(cost.processor_us)
    return table, {name: statistics.median(values) for name, values in processor.items()}


def think_sleeping() -> None:
    time.sleep(0.005)


def think_busy() -> None:
    until, counted = time.perf_counter() + 0.005, 0
    while time.perf_counter() < until:
        counted += 1


def latencies_us(batches: Batches, think: Callable[[], None], count: int) -> list[float]:
    latencies = []
    for _ in range(count):
        think()
        begun = time.perf_counter()
        batch = next(batches)
        latencies.append((time.perf_counter() - begun) * 1e6)
        del batch
    return sorted(latencies)


def handover(manifest: Manifest, rounds: int, count: int = 200) -> tuple[Table, dict[str, list[float]]]:
    """Per way: the median of each round in us; and [p50, p99, p99.9] of all rounds together."""
    read_in(manifest.folder)
    chosen = {**ours(manifest), **rivals(manifest.folder)}
    opened = {name: way() for name, way in chosen.items()}
    for name in ours(manifest):
        warm(opened[name], manifest)
    table: Table = {}
    pooled: dict[str, list[float]] = {}
    for number in range(rounds):
        for name in rotated(list(opened), number):
            for kind, think in (("sleep", think_sleeping), ("busy", think_busy)):
                next(opened[name])
                found = latencies_us(opened[name], think, count)
                table.setdefault(f"{name}, {kind}", []).append(found[count // 2])
                pooled.setdefault(f"{name}, {kind}", []).extend(found)
    quantiles = {}
    for name, values in pooled.items():
        values.sort()
        quantiles[name] = [values[min(len(values) - 1, int(len(values) * q))] for q in (0.5, 0.99, 0.999)]
    return table, quantiles


def cold_rows(manifest: Manifest, access: str, depth: int | None) -> tuple[float, float]:
    """Million tokens per second and p99 in us a row, of random rows nobody has read yet."""
    drop_cache(manifest.folder)
    one = loader(manifest, access=access, prefetch_batches=depth)
    waits, begun = [], time.perf_counter()
    for _ in range(500):
        asked = time.perf_counter()
        one.next_batch()
        waits.append((time.perf_counter() - asked) * 1e6 / BATCH)
    rate = 500 * TOKENS / (time.perf_counter() - begun) / 1e6
    one.close()
    return rate, sorted(waits)[495]


def cold_numpy(manifest: Manifest) -> tuple[float, float]:
    drop_cache(manifest.folder)
    batches = rivals(manifest.folder)["numpy gather, int32"]()
    waits, begun = [], time.perf_counter()
    for _ in range(500):
        asked = time.perf_counter()
        next(batches)
        waits.append((time.perf_counter() - asked) * 1e6 / BATCH)
    return 500 * TOKENS / (time.perf_counter() - begun) / 1e6, sorted(waits)[495]


def cold_blocks(manifest: Manifest) -> float:
    """Million tokens per second of one epoch in block order, every token touched."""
    drop_cache(manifest.folder)
    one = loader(manifest, shuffle="block", block_sequences=128)
    batches, begun = one.sequences_per_epoch // BATCH, time.perf_counter()
    for _ in range(batches):
        for micro in one.next_batch():
            micro.sum()
    rate = batches * TOKENS / (time.perf_counter() - begun) / 1e6
    one.close()
    return rate


def sequential_read(manifest: Manifest) -> float:
    """Million tokens per second of reading the files in 4 MiB pieces, every token touched."""
    drop_cache(manifest.folder)
    buffer = bytearray(4 << 20)
    tokens, begun = 0, time.perf_counter()
    for shard in manifest.shards:
        with manifest.path_of(shard).open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                np.frombuffer(buffer, np.int32, size // 4).sum()
                tokens += size // 4
    return tokens / (time.perf_counter() - begun) / 1e6


def cold(manifest: Manifest, rounds: int) -> tuple[Table, Table]:
    """Rates in million tokens per second, and p99 in us a row."""
    rates: Table = {}
    p99: Table = {}
    rows: dict[str, Callable[[], tuple[float, float]]] = {
        "random rows, read ahead": lambda: cold_rows(manifest, "mmap", None),
        "random rows, read ahead, pread": lambda: cold_rows(manifest, "pread", None),
        "random rows, on demand": lambda: cold_rows(manifest, "mmap", 0),
        "random rows, numpy gather": lambda: cold_numpy(manifest),
    }
    whole = {
        "blocks of 128": lambda: cold_blocks(manifest),
        "sequential read": lambda: sequential_read(manifest),
    }
    for number in range(rounds):
        for name in rotated([*rows, *whole], number):
            if name in rows:
                rate, tail = rows[name]()
                p99.setdefault(name, []).append(tail)
            else:
                rate = whole[name]()
            rates.setdefault(name, []).append(rate)
    return rates, p99


def show(title: str, table: Table, extra: Callable[[str, float], str] = lambda _name, _median: "") -> None:
    print(f"\n### {title}\n")
    for line in lines_of(table, extra):
        print(line)


def lines_of(table: Table, extra: Callable[[str, float], str]) -> Iterator[str]:
    yield "| | median | min to max | |"
    yield "|---|---|---|---|"
    for name, values in table.items():
        median = statistics.median(values)
        yield f"| {name} | {median:,.4g} | {min(values):,.4g} to {max(values):,.4g} | {extra(name, median)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sections = ["throughput", "handover", "cold", "start"]
    parser.add_argument("--sections", nargs="+", choices=sections, default=sections)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--folder", type=Path, help="keep the data here instead of in a temporary folder")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = run_sections(arguments, folder)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


def run_sections(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    manifest = make_data(folder, arguments.shards)
    load = os.getloadavg()[0]
    conditions = f"{os.cpu_count()} cores, load {load:.1f} at the start, torch {torch.__version__}, "
    conditions += f"batch ({BATCH}, {WIDTH})"
    print(conditions)
    found: dict[str, Any] = {"conditions": conditions}
    if "throughput" in arguments.sections:
        table, processor = throughput(manifest, arguments.rounds, arguments.seconds)
        found["throughput"] = {"rates": table, "processor us a batch": processor}
        show(
            "Hot, million tokens/s",
            table,
            lambda name, median: f"{TOKENS / median:,.3g} us a batch; {processor[name]:,.3g} us of processor",
        )
    if "handover" in arguments.sections:
        table, quantiles = handover(manifest, arguments.rounds)
        found["handover"] = {"medians": table, "p50 p99 p99.9": quantiles}
        show(
            "Hand-over after 5 ms of think time, us",
            table,
            lambda name, _: "p99 {1:,.3g}, p99.9 {2:,.3g}, {3:.3f} % of a step".format(
                *quantiles[name], quantiles[name][0] / STEP_MS / 10
            ),
        )
    if "cold" in arguments.sections:
        rates, p99 = cold(manifest, arguments.rounds)
        found["cold"] = {"rates": rates, "p99 a row": p99}
        show(
            "Cold, million tokens/s",
            rates,
            lambda name, _: f"p99 {statistics.median(p99[name]):,.4g} us a row" if name in p99 else "",
        )
    if "start" in arguments.sections:
        table = found["start"] = start(arguments.rounds, folder)
        show("A trillion tokens in 100,000 shards (sparse)", table)
    return found


if __name__ == "__main__":
    main()
