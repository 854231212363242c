"""A longer hunt than the suite's: thousands of mutated APR files, each refused rightly or read rightly.

Run as ``python tests/fuzz_apr.py --files 20000 [--seed 0]``. A file counts as a failure when opening it
ends in anything but one of the model file errors, takes more than a second, or when a file whose
checksum no longer matches is read at all. Memory is held against 200 MB beyond the largest file.
"""

from __future__ import annotations

import argparse
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from builders.files import RawEntry, assemble, seal

from apr_dist.apr.layout import DType, Header, payload_bytes
from apr_dist.apr.reader import AprReader
from apr_dist.errors import ModelFileError

MAX_SECONDS = 1.0
MAX_EXTRA_BYTES = 200_000_000
NUMBERS = (0, 1, 3, 63, 64, 65, 127, 255, 256, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32)
HUGE = (1 << 40, (1 << 62) + 64, (1 << 63) - 1, 1 << 63, (1 << 64) - 64, (1 << 64) - 1)
NAMES = (
    b"",
    b"a",
    b"b\0c",
    b"../../etc/passwd",
    b"\xff\xfe",
    b"n" * 256,
    b"n" * 257,
    "é".encode(),
    b"\x1b[2J",
)
CODES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 30, 31, 128, 129, 130, 255)
DOCUMENTS = (
    b"{}",
    b"",
    b"null",
    b"[]",
    b"{",
    b'{"a":' + b"[" * 100_000,
    b'{"a":' + b'{"a":' * 2000 + b"1" + b"}" * 2001,
    b'{"a":"' + b"[" * 50_000 + b'"}',
    b'{"a":' + b"9" * 10_000 + b"}",
    b'{"a":1e99999}',
    b'{"a":"\\ud800"}',
    b'{"hidden_size":-1}',
    b'{"hidden_size":{}}',
    b'{"hidden_size":1,"hidden_size":2,"n_embd":3}',
    b'{"a":[' + b"{}," * 60_000 + b"{}]}",
    b'{"a":[' + b'"",' * 600_000 + b'""]}',
    b"\xef\xbb\xbf{}",
    b'{"a":"\xff"}',
)


def good_file(rng: random.Random) -> bytes:
    """A sound file with some tensors of every kind."""
    shapes = {
        0: (3, 5),
        1: (7,),
        30: (2, 2, 2),
        12: (256,),
        14: (2, 256),
        128: (40,),
        129: (9,),
        3: (2,),
        7: (),
    }
    entries: list[RawEntry] = []
    data = b""
    for name, code in zip("abcdefghi", rng.sample(sorted(shapes), rng.randint(0, 9)), strict=False):
        size = payload_bytes(DType(code), shapes[code])
        entries.append((name.encode(), code, shapes[code], len(data), size))
        data += rng.randbytes(size).ljust(-(-size // 64) * 64, b"\0")
    return assemble(entries, data, metadata=b'{"model_type":"x","hidden_size":4,"custom":[1,{"a":null}]}')


def liar(rng: random.Random) -> bytes:
    """A file with valid checksums, some of whose numbers lie."""
    entries: list[RawEntry] = []
    data_bytes = rng.choice((0, 64, 64, 256, 4096))
    for _ in range(rng.randint(0, 4)):
        lie = rng.random() < 0.6
        dims = [
            rng.choice((*NUMBERS, *HUGE)) if lie else rng.randint(0, 8)
            for _ in range(rng.choice((0, 1, 2, 3, 8, 9)))
        ]
        size = rng.choice((*NUMBERS, *HUGE)) if lie else 4 * int(np.prod(dims or [1], dtype=object))
        offset = rng.choice((*NUMBERS, *HUGE)) if lie else 64 * rng.randint(0, 4)
        entries.append((rng.choice(NAMES), rng.choice(CODES) if lie else 0, dims, offset, size))
    if rng.random() < 0.8:
        entries.sort()
    limits = {"metadata_size": 32, "index_offset": 64, "data_offset": 64, "metadata_offset": 64}
    overrides = {
        key: rng.choice((*NUMBERS, *HUGE)) % (1 << bits) for key, bits in limits.items() if rng.random() < 0.1
    }
    return assemble(
        entries,
        rng.randbytes(data_bytes),
        metadata=rng.choice(DOCUMENTS) if rng.random() < 0.5 else b"{}",
        count=rng.choice((*NUMBERS[:-1], len(entries))) if rng.random() < 0.2 else None,
        flags=rng.choice((0, 0x400, 0x400, 0x600, rng.getrandbits(16))),
        **overrides,
    )


def mutated(rng: random.Random) -> bytes:
    """A sound file with bytes changed, cut, repeated or inserted."""
    content = bytearray(good_file(rng))
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        position = rng.randrange(len(content))
        kind = rng.randrange(6)
        if kind == 0:
            content[position] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[position:]
        elif kind == 2:
            content[position : position + 8] = struct.pack("<Q", rng.choice((*NUMBERS, *HUGE)))
        elif kind == 3:
            content[position:position] = rng.randbytes(rng.choice((1, 4, 64)))
        elif kind == 4:
            del content[position : position + rng.choice((1, 4, 64))]
        else:
            start = rng.randrange(len(content))
            content[position : position + 16] = content[start : start + 16]
        if not content:
            break
    return bytes(content)


def resealed(content: bytes) -> bytes:
    """The same lie under valid checksums, so that it gets past them."""
    if len(content) < 68:
        return content
    header = bytearray(content[:64])
    header[40:44] = bytes(4)
    fields = struct.unpack("<4sBBHIQIQQI20s", header)
    packed = Header(fields[3], fields[4], fields[6], fields[7], fields[8], fields[5], fields[1:3], fields[10])
    return seal(content[:4] + packed.pack()[4:] + content[64:-4])


def make(rng: random.Random) -> tuple[bytes, bool]:
    """A hostile file, and whether its footer may be trusted to match."""
    kind = rng.randrange(3)
    if kind == 0:
        return liar(rng), True
    content = mutated(rng)
    return (resealed(content), True) if kind == 1 else (content, False)


def check(content: bytes, path: Path, *, sealed: bool) -> str:
    """Open and read everything; the name of the refusal, or ``"read"``.

    Raises:
        AssertionError: what was read is wrong.
    """
    path.write_bytes(content)
    try:
        with AprReader(path) as reader:
            for name, entry in reader.tensors.items():
                assert len(reader.raw(name)) == entry.size_bytes, "a payload of another size"
                assert reader.float32(name).shape == entry.shape, "a tensor of another shape"
        outcome = "read"
    except ModelFileError as error:
        outcome = type(error).__name__ if error.where == str(path) else "an error without the file's name"
    assert " " not in outcome, outcome
    if outcome == "read" and not sealed:
        assert seal(content[:-4]) == content, "a file whose checksum is wrong was read"
    return outcome


def main() -> None:
    """Run the hunt and print what happened to how many files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    outcomes: Counter[str] = Counter()
    largest, slowest = 0, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hostile.apr"
        for number in range(arguments.files):
            content, sealed = make(random.Random(arguments.seed * 1_000_003 + number))
            start = time.process_time()
            try:
                outcomes[check(content, path, sealed=sealed)] += 1
            except BaseException:
                print(f"failed: seed {arguments.seed}, file {number}", file=sys.stderr)
                raise
            slowest = max(slowest, time.process_time() - start)
            largest = max(largest, len(content))
    extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    for outcome, count in outcomes.most_common():
        print(f"{count:8d}  {outcome}")
    print(
        f"largest file {largest / 1e6:.1f} MB, memory grew by {extra / 1e6:.1f} MB, slowest {slowest:.3f} s"
    )
    if slowest > MAX_SECONDS:
        raise SystemExit("a file took more than a second")
    if extra > MAX_EXTRA_BYTES + largest:
        raise SystemExit("memory beyond 200 MB over the largest file")


if __name__ == "__main__":
    main()
