"""Files from strangers: whatever they hold, they are read rightly or refused rightly."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from builders.files import assemble
from fuzz_apr import MAX_EXTRA_BYTES, check, good_file, make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 62))
def test_a_hostile_file_is_read_rightly_or_refused_rightly(tmp_path: Path, seed: int) -> None:
    content, sealed = make(random.Random(seed))
    check(content, tmp_path / "x.apr", sealed=sealed)


def test_the_files_that_are_mutated_are_sound_to_begin_with(tmp_path: Path) -> None:
    for seed in range(20):
        assert check(good_file(random.Random(seed)), tmp_path / "x.apr", sealed=True) == "read"


MEASURE = """
import sys
from pathlib import Path
from apr_dist.apr.reader import AprReader
from apr_dist.errors import ModelFileError
def peak_bytes():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak_bytes()
try:
    AprReader(Path(sys.argv[1]))
except ModelFileError as error:
    print(type(error).__name__, peak_bytes() - before)
"""
FULL = 15_000_000


@pytest.mark.parametrize(
    "metadata",
    [
        b'{"a":[' + b"[]," * (FULL // 3) + b"1]}",
        b'{"a":[' + b'"bc",' * (FULL // 5) + b"1]}",
        b'{"a":[' + b'{"b":1},' * (FULL // 8) + b"1]}",
        b'{"a":[' + b"1.5," * (FULL // 4) + b"1]}",
        b'{"a":' + b"[" * FULL,
        b'{"a":"' + b'\\"[' * (FULL // 3),
    ],
    ids=["lists", "strings", "objects", "numbers", "depth", "unending string"],
)
def test_metadata_made_to_fill_memory_is_refused_before_it_does(tmp_path: Path, metadata: bytes) -> None:
    path = tmp_path / "x.apr"
    path.write_bytes(assemble([], b"", metadata=metadata))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    kind, grown = done.stdout.split()
    assert kind == "DamagedModelFile"
    assert int(grown) < MAX_EXTRA_BYTES + path.stat().st_size


def test_an_index_of_a_million_tensors_is_refused_before_it_fills_memory(tmp_path: Path) -> None:
    entries = [(f"{i:08d}".encode(), 0, (), 0, 4) for i in range(1_000_000)]
    path = tmp_path / "x.apr"
    path.write_bytes(assemble(entries, bytes(64)))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
    )
    kind, grown = done.stdout.split()
    assert kind == "UnsupportedModelFile"
    assert int(grown) < MAX_EXTRA_BYTES + path.stat().st_size
