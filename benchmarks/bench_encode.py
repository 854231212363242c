"""Encoding a corpus beside a bare loop over the tokenizers library that throws its result away.

Both take the same texts with the same tokenizer on the same cores, one after the other in turn; the ratio is the
figure. The bare loop has the texts in memory already; the encoder reads files, hashes, splits and writes shards.

    python benchmarks/bench_encode.py --tokenizer DIR [--rounds 5] [--megabytes 8] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer

from apr_dist.data.corpus import standard_library_sources
from apr_dist.data.encode import encode_corpus
from apr_dist.data.tokenizer import load_tokenizer

PUBLISHED_TOKENS_PER_S = 9_100  # a single-thread encoder of the 151,643-entry Qwen vocabulary


def chosen_sources(megabytes: float) -> list[Path]:
    chosen, size = [], 0
    for path in standard_library_sources():
        if path.stat().st_size and size < megabytes * 1e6:
            chosen.append(path)
            size += path.stat().st_size
    return chosen


def bare_loop(tokenizer: Tokenizer, texts: list[str], batch: int) -> float:
    """Seconds to encode ``texts`` and keep nothing."""
    begin = time.perf_counter()
    for start in range(0, len(texts), batch):
        tokenizer.encode_batch_fast(texts[start : start + batch], add_special_tokens=False)
    return time.perf_counter() - begin


def full_encoding(sources: list[Path], tokenizer: Path, output: Path) -> tuple[float, int]:
    """Seconds from the call to the published data set, and its tokens."""
    begin = time.perf_counter()
    summary = encode_corpus(
        sources=sources, tokenizer=tokenizer, output=output, val_fraction=0.05, overwrite=True
    )
    return time.perf_counter() - begin, summary.tokens


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.2f} ({min(values):,.2f}-{max(values):,.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=8.0, help="standard-library source to encode")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    choice = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    sources = chosen_sources(choice.megabytes)
    texts = [path.read_text("utf-8") for path in sources]
    loaded = load_tokenizer(choice.tokenizer)
    output = Path(tempfile.mkdtemp(prefix="bench-encode-")) / "out"
    rates: dict[str, list[float]] = {"bare loop": [], "encode_corpus": []}
    bare_loop(loaded.tokenizer, texts[:50], 16)
    full_encoding(sources[:50], choice.tokenizer, output)
    for number in range(choice.rounds):
        batch = (16, 64)[number % 2]  # either may be the loop's better batch; the best of each round counts
        seconds, tokens = full_encoding(sources, choice.tokenizer, output)
        bare = min(bare_loop(loaded.tokenizer, texts, batch), bare_loop(loaded.tokenizer, texts, 80 - batch))
        rates["bare loop"].append(tokens / bare / 1e6)
        rates["encode_corpus"].append(tokens / seconds / 1e6)
    shutil.rmtree(output.parent)
    ratios = [a / b for a, b in zip(rates["encode_corpus"], rates["bare loop"], strict=True)]
    times_published = [rate * 1e6 / PUBLISHED_TOKENS_PER_S for rate in rates["encode_corpus"]]
    characters = sum(map(len, texts))
    print(
        f"{len(texts)} files, {characters:,} characters, {tokens:,} tokens, {len(os.sched_getaffinity(0))} cores"
    )
    for name, values in rates.items():
        print(f"{name:24} {spread(values)} M tokens/s")
    print(f"{'ratio':24} {spread(ratios)}")
    print(f"{'times the published':24} {spread(times_published)}")
    if choice.json:
        figures = {**rates, "ratio": ratios, "times_published": times_published, "tokens": tokens}
        choice.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
