"""Memory of encoding a large corpus: gigabytes of JSONL streamed into the command, and its peak so far.

What is judged is the streaming, not the tokenizer, so one that is quick on this text is made for it: byte
level, with 4,000 lines of the standard library's source as added tokens. The documents are those lines in
random order, a few hundred bytes to a few hundred kilobytes long, and one in every 20,000 has 8 MB. Memory is
the resident memory of the command and of every process it starts, added up ten times a second.

    python benchmarks/encode_memory.py [--gigabytes 10] [--folder DIR] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from apr_dist.corpus.sources import standard_library_sources
from apr_dist.corpus.tokenizer import import_tokenizer
from apr_dist.data import Manifest

LINES = 4_000
LARGE_EVERY, LARGE_BYTES = 20_000, 8_000_000
END = "<|endoftext|>"


def source_lines() -> list[str]:
    """Distinct lines of the standard library's source, 20 to 200 characters long."""
    lines: dict[str, None] = {}
    for path in standard_library_sources():
        for line in path.read_text("utf-8").splitlines():
            if 20 <= len(line) < 200 and line.isascii():
                lines[line] = None
        if len(lines) >= LINES:
            break
    return list(lines)[:LINES]


def write_tokenizer(lines: list[str], folder: Path) -> None:
    """A byte-level tokenizer without merges that knows every line as one token."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary[END] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(line, normalized=False) for line in lines])
    source = folder / "source"
    source.mkdir()
    tokenizer.save(str(source / "tokenizer.json"))
    import_tokenizer(source, folder / "tokenizer")


def documents(lines: list[str]) -> Iterator[bytes]:
    """JSON lines without end; the same every time."""
    generator = random.Random(1)
    pieces = [json.dumps(line + "\n")[1:-1].encode() for line in lines]
    number = 0
    while True:
        number += 1
        wanted = LARGE_BYTES if number % LARGE_EVERY == 0 else int(10 ** generator.uniform(2.3, 5.3))
        yield b'{"content": "%s"}\n' % b"".join(generator.choices(pieces, k=max(1, wanted // 45)))


def resident_mb(root: int) -> float:
    """Resident memory of a process and its descendants, in MB."""
    children: dict[int, list[int]] = {}
    resident: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split() if entry.name.isdigit() else []
        except OSError:
            continue
        if fields:
            children.setdefault(int(fields[1]), []).append(int(entry.name))
            resident[int(entry.name)] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    family = [root]
    for process in family:
        family += children.get(process, [])
    return sum(resident.get(process, 0) for process in family) / 1e6


class Peak(threading.Thread):
    """Watches a process tree until it ends."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        super().__init__(daemon=True)
        self.process, self.mb = process, 0.0

    def run(self) -> None:
        """Look ten times a second."""
        while self.process.poll() is None:
            self.mb = max(self.mb, resident_mb(self.process.pid))
            time.sleep(0.1)


def feed(target: IO[bytes], lines: list[str], total: int, peak: Peak) -> list[tuple[float, float]]:
    """Write ``total`` bytes; (GB written, peak so far in MB) at every gigabyte."""
    curve: list[tuple[float, float]] = []
    written = count = 0
    for line in documents(lines):
        target.write(line)
        written, count = written + len(line), count + 1
        if written // 10**9 > len(curve) or written >= total:
            curve.append((written / 1e9, peak.mb))
            print(f"{written / 1e9:5.1f} GB, {count:,} documents: peak {peak.mb:,.0f} MB", flush=True)
        if written >= total:
            return curve
    raise AssertionError("documents never end")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--folder", type=Path, help="where the shards are written for a while")
    parser.add_argument("--json", type=Path)
    choice = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="encode-memory-", dir=choice.folder) as name:
        folder, lines = Path(name), source_lines()
        write_tokenizer(lines, folder)
        command = [sys.executable, "-m", "apr_dist", "tokenize", "encode-corpus", "--corpus", "-"]
        command += ["--tokenizer", str(folder / "tokenizer"), "--output", str(folder / "out")]
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert process.stdin is not None
        peak = Peak(process)
        peak.start()
        curve = feed(process.stdin, lines, int(choice.gigabytes * 1e9), peak)
        process.stdin.close()
        if process.wait():
            raise SystemExit(f"the command ended with {process.returncode}")
        peak.join()
        manifest = Manifest.load(folder / "out")
        print(
            f"{manifest.total_documents:,} documents, {manifest.total_tokens:,} tokens, "
            f"{manifest.shard_count} shards in {time.perf_counter() - begun:,.0f} s: peak {peak.mb:,.0f} MB"
        )
    if choice.json:
        choice.json.write_text(json.dumps({"peak MB": peak.mb, "curve": curve}, indent=1) + "\n")


if __name__ == "__main__":
    main()
