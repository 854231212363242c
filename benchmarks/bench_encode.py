"""Encoding a corpus beside a bare loop over the tokenizers library that throws its result away.

Both take the same texts with the same tokenizer on the same cores, in turn; the ratio is the figure. The
bare loop has texts and tokenizer in memory already; the encoder opens the tokenizer, reads JSONL, hashes,
splits, and writes shards to disk.

    python benchmarks/bench_encode.py --tokenizer DIR [--rounds 5] [--megabytes 24] [--quote] [--json PATH]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from apr_dist.corpus.encode import encode_corpus
from apr_dist.corpus.sources import standard_library_sources
from apr_dist.corpus.tokenizer import load_tokenizer
from apr_dist.data import Manifest

PUBLISHED_TOKENS_PER_S = 9_100  # a single-thread encoder of the 151,643-entry Qwen vocabulary


def corpus_texts(megabytes: float) -> list[str]:
    """Standard-library sources, taken again until there are enough."""
    texts: list[str] = []
    size = 0
    for path in itertools.cycle(standard_library_sources()):
        text = path.read_text("utf-8")
        if not text:
            continue
        if size >= megabytes * 1e6:
            return texts
        texts.append(text)
        size += len(text)
    return texts


@dataclass(frozen=True)
class Cost:
    """What a piece of work took: wall seconds, and seconds of all threads on the processor."""

    wall_s: float
    processor_s: float


def timed(work: Callable[[], object]) -> Cost:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return Cost(time.perf_counter() - wall, time.process_time() - processor)


def bare_loop(tokenizer: Tokenizer, texts: list[str], batch: int) -> None:
    """Encode ``texts`` and keep nothing."""
    for start in range(0, len(texts), batch):
        tokenizer.encode_batch_fast(texts[start : start + batch], add_special_tokens=False)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.2f} ({min(values):,.2f}-{max(values):,.2f})"


def measure(folder: Path, tokenizer_folder: Path, texts: list[str], rounds: int) -> dict[str, list[float]]:
    """Rates in M tokens/s and their ratios, one value a round."""
    corpus, output = folder / "corpus.jsonl", folder / "out"
    lines = (json.dumps({"content": text}, ensure_ascii=False) + "\n" for text in texts)
    corpus.write_text("".join(lines), "utf-8")
    loaded = load_tokenizer(tokenizer_folder)
    figures: dict[str, list[float]] = {}
    bare_loop(loaded.tokenizer, texts[:50], 16)
    for _ in range(rounds):
        full = timed(
            lambda: encode_corpus(
                sources=[corpus], tokenizer=tokenizer_folder, output=output, val_fraction=0.05, overwrite=True
            )
        )
        bare = min(
            (timed(lambda size=size: bare_loop(loaded.tokenizer, texts, size)) for size in (16, 64)),
            key=lambda cost: cost.wall_s,
        )
        tokens = sum(Manifest.load(output / part).total_tokens for part in ("train", "validation"))
        row = {
            "bare loop, M tokens/s": tokens / bare.wall_s / 1e6,
            "encode_corpus, M tokens/s": tokens / full.wall_s / 1e6,
            "ratio of rates": bare.wall_s / full.wall_s,
            "ratio of processor time": bare.processor_s / full.processor_s,
            "times the published rate": tokens / full.wall_s / PUBLISHED_TOKENS_PER_S,
        }
        for name, value in row.items():
            figures.setdefault(name, []).append(value)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=24.0, help="standard-library source to encode")
    parser.add_argument("--quote", action="store_true", help="begin each text with a curly quote")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    choice = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    texts = [("\u2019" if choice.quote else "") + text for text in corpus_texts(choice.megabytes)]
    with tempfile.TemporaryDirectory(prefix="bench-encode-") as folder:
        figures = measure(Path(folder), choice.tokenizer, texts, choice.rounds)
    cores = len(os.sched_getaffinity(0))
    print(
        f"{len(texts)} documents, {sum(map(len, texts)):,} characters, {cores} cores, {choice.rounds} rounds"
    )
    for name, values in figures.items():
        print(f"{name:28} {spread(values)}")
    if choice.json:
        choice.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
