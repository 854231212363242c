"""The start of ``bench_loader``: first batch, seeks and memory of a sparse data set of a trillion tokens."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loader_rivals import BATCH, WIDTH

from apr_dist.data.loader import TokenLoader
from apr_dist.data.manifest import Manifest, Shard

Table = dict[str, list[float]]


def loader(manifest: Manifest, **options: Any) -> TokenLoader:
    defaults = {
        "seq_length": WIDTH - 1,
        "global_batch": BATCH,
        "micro_batch": BATCH,
        "seed": 1,
        "verify": "off",
    }
    return TokenLoader(manifest, **{**defaults, **options})


def resident_mb() -> float:
    fields = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()
    return int(fields[0]) / 1024


def start_once(folder: Path) -> dict[str, float]:
    """In a process of its own: open a trillion tokens, first batch, seeks, memory."""
    torch.zeros(1).sum()
    opening = time.perf_counter()
    manifest = Manifest.load(folder)
    opening = time.perf_counter() - opening
    before, begun = resident_mb(), time.perf_counter()
    one = loader(manifest)
    one.next_batch()
    first = time.perf_counter() - begun
    generator = np.random.default_rng(2)
    seeks = []
    for k in generator.integers(10**9, size=500).tolist():
        begun = time.perf_counter()
        one.load_state({**one.state(), "global_batch": k})
        one.next_batch()
        seeks.append((time.perf_counter() - begun) * 1e3)
    for _ in range(2000):
        one.next_batch()
    memory = resident_mb() - before
    return {
        "open the manifest, ms": opening * 1e3,
        "first batch beyond it, ms": first * 1e3,
        "seek and read, median ms": statistics.median(seeks),
        "seek and read, p99 ms": sorted(seeks)[495],
        "memory beyond the manifest, MB": memory,
        "open shards": one.stats()["shards_open"],
    }


def write_manifest_of_zeros(folder: Path) -> None:
    """100,000 shards of zeros; the provenance hashes are made up, the quick ones left out."""
    shards = tuple(
        Shard(
            file=f"shard-{index:05d}.bin",
            tokens=10_000_000,
            bytes=40_000_000,
            sha256=f"{index:064x}",
            min_id=0,
            max_id=0,
        )
        for index in range(100_000)
    )
    Manifest(folder=folder, shards=shards, vocab_size=None, tokenizer=None).write()


def start(rounds: int, where: Path) -> Table:
    table: Table = {}
    with tempfile.TemporaryDirectory(dir=where) as name:
        for index in range(100_000):
            with (Path(name) / f"shard-{index:05d}.bin").open("wb") as file:
                file.truncate(40_000_000)
        write_manifest_of_zeros(Path(name))
        for _ in range(rounds):
            command = [sys.executable, __file__, name]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for key, value in found.items():
                table.setdefault(key, []).append(value)
    return table


if __name__ == "__main__":
    print(json.dumps(start_once(Path(sys.argv[1]))))
