"""What the loader asks of the system, and what processes of one host tell each other about shards."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.shards import build_shards

from apr_dist.data import descriptors, token_stream
from apr_dist.data.loader import TokenLoader
from apr_dist.data.manifest import Manifest
from apr_dist.errors import ShardError


def loader(manifest: Manifest, **options: object) -> TokenLoader:
    defaults = {"seq_length": 4, "global_batch": 4, "micro_batch": 2, "seed": 1}
    return TokenLoader(manifest, **{**defaults, **options})  # type: ignore[arg-type]


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's processes remember what they verified, at once."""
    path = tmp_path / "verified"
    monkeypatch.setattr(token_stream, "verified_marks", lambda: path)
    monkeypatch.setattr(token_stream, "SETTLE_S", 0.0)
    return path


def made_long_ago(manifest: Manifest) -> Manifest:
    """After the second in which its files were written, which is what marks tell times apart by."""
    newest = max(manifest.path_of(shard).stat().st_ctime for shard in manifest.shards)
    while time.time() <= int(newest) + 1:
        time.sleep(0.05)
    return manifest


@pytest.mark.usefixtures("marks")
def test_a_shard_is_verified_once_a_host_and_again_when_it_changed(tmp_path: Path) -> None:
    manifest = made_long_ago(build_shards(tmp_path / "shards", [50, 60, 70]))
    first, second = loader(manifest), loader(manifest)
    for k in range(11):
        first.batch(k)
    for k in range(11):
        second.batch(k)
    assert (first.stats()["shards_verified"], second.stats()["shards_verified"]) == (3, 0)
    assert loader(manifest, verify="open").stats()["shards_verified"] == 3
    path = manifest.path_of(manifest.shards[1])
    content = bytearray(path.read_bytes())
    times = path.stat()
    content[100] ^= 1
    with path.open("r+b") as file:  # in place, with the time put back
        file.write(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = loader(manifest, shuffle="none")
    with pytest.raises(ShardError, match="shard-00001"):
        list(changed)


def through_a_second_name(path: Path, content: bytes) -> None:
    other = path.with_name("other-name")
    other.hardlink_to(path)
    other.write_bytes(content)
    other.unlink()


def by_a_file_of_the_same_time(path: Path, content: bytes) -> None:
    fresh, times = path.with_name("fresh"), path.stat()
    fresh.write_bytes(content)
    os.utime(fresh, ns=(times.st_atime_ns, times.st_mtime_ns))
    fresh.replace(path)


def cut_and_grown_again(path: Path, content: bytes) -> None:
    times = path.stat()
    os.truncate(path, 8)
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def through_a_map(path: Path, content: bytes) -> None:
    times = path.stat()
    np.memmap(path, dtype=np.uint8, mode="r+")[:] = np.frombuffer(content, np.uint8)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.usefixtures("marks")
@pytest.mark.parametrize(
    "overwrite", [through_a_second_name, by_a_file_of_the_same_time, cut_and_grown_again, through_a_map]
)
@pytest.mark.parametrize("open_already", [True, False])
def test_a_shard_that_was_verified_is_verified_again_however_it_was_overwritten(
    tmp_path: Path, overwrite: Callable[[Path, bytes], None], open_already: bool
) -> None:
    manifest = made_long_ago(build_shards(tmp_path / "shards", [50]))
    before = loader(manifest, shuffle="none", recheck_s=0.0)
    before.batch(0)
    path = manifest.path_of(manifest.shards[0])
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    overwrite(path, bytes(content))
    reader = before if open_already else loader(manifest, shuffle="none")
    with pytest.raises(ShardError, match="shard-00000"):
        list(reader)


@pytest.mark.parametrize("spoil", ["garbage", "torn", "a folder", "a pipe", "forbidden"])
def test_marks_that_cannot_be_read_are_never_believed(tmp_path: Path, marks: Path, spoil: str) -> None:
    manifest = made_long_ago(build_shards(tmp_path / "shards", [50, 60]))
    if spoil == "garbage":
        marks.write_bytes(np.arange(4096, dtype=np.uint64).tobytes())
    elif spoil == "torn":
        list(loader(manifest, max_epochs=1))
        marks.write_bytes(marks.read_bytes()[3:])
    elif spoil == "a folder":
        marks.mkdir()
    elif spoil == "a pipe":
        os.mkfifo(marks)
    else:
        marks.touch(mode=0o000)
    reader = loader(manifest, max_epochs=1)
    list(reader)
    assert reader.stats()["shards_verified"] == 2


def test_marks_are_kept_where_only_their_owner_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = descriptors.verified_marks()
    assert path is not None
    assert path.parent == tmp_path / "apr-dist"
    path.parent.chmod(0o777)
    assert descriptors.verified_marks() is None
    path.parent.rmdir()
    (tmp_path / "apr-dist").touch()
    assert descriptors.verified_marks() is None


def test_every_shard_stays_open_where_the_system_allows_it(tmp_path: Path) -> None:
    manifest = build_shards(tmp_path, [9] * 400)
    one, few = loader(manifest), loader(manifest, max_open_shards=300)
    for k in range(200):
        assert torch.equal(one.batch(k)[0], few.batch(k)[0])
    assert one.stats()["shards_opened"] == one.stats()["shards_open"] == 400
    assert few.stats()["shards_open"] <= 300


LIMITED = """
import resource, sys
from pathlib import Path
soft, hard = int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
from apr_dist.data.loader import TokenLoader
from apr_dist.data.manifest import Manifest
from apr_dist.errors import AprDistError
try:
    loader = TokenLoader(Manifest.load(Path(sys.argv[1])), seq_length=4, global_batch=8, micro_batch=1,
                         seed=1, shuffle="block", block_sequences=1)
    held = [loader.next_batch() for _ in range(int(sys.argv[4]))]
    print(len(held), loader.stats()["shards_open"], resource.getrlimit(resource.RLIMIT_NOFILE)[0])
except AprDistError as error:
    print(error)
"""


def limited(folder: Path, soft: int, hard: int, batches: int) -> str:
    command = [sys.executable, "-c", LIMITED, *map(str, (folder, soft, hard, batches))]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_more_shards_in_views_than_the_soft_limit_of_open_files(tmp_path: Path) -> None:
    build_shards(tmp_path, [9] * 900)
    held, still_open, soft = map(int, limited(tmp_path, 256, 4096, 60).split())
    assert held == 60
    assert still_open > 256
    assert 256 < soft <= 4096


def test_a_hard_limit_that_is_too_low_is_refused_at_the_start_with_a_fix(tmp_path: Path) -> None:
    build_shards(tmp_path, [9] * 900)
    said = limited(tmp_path, 500, 800, 1)
    assert "may open 800 files" in said
    assert "ulimit -n" in said
    assert "--loader.prefetch-batches" in said


@pytest.mark.parametrize(
    ("shards", "wanted", "in_views", "limit", "expected"),
    [
        (10, None, 0, 1024, 10),
        (5000, None, 0, 1024, 640),
        (5000, 300, 0, 1024, 300),
        (5000, None, 500, 1024, 140),
        (10**6, None, 0, 10**6, 1 << 15),
        (5000, None, 0, resource.RLIM_INFINITY, 5000),
        (5000, 10**6, 0, 2048, 1664),
        (1, 300, 0, 1024, 1),
        (0, None, 0, 1024, 1),
        (5000, 1, 600, 1024, 1),
    ],
)
def test_shards_kept_open_are_what_the_limit_leaves(
    monkeypatch: pytest.MonkeyPatch, shards: int, wanted: int | None, in_views: int, limit: int, expected: int
) -> None:
    monkeypatch.setattr(descriptors.resource, "getrlimit", lambda _: (limit, limit))
    monkeypatch.setattr(descriptors.resource, "setrlimit", lambda *_: None)
    assert descriptors.open_limit(shards, wanted, in_views=in_views) == expected


def test_an_intact_shard_that_was_only_touched_is_read_on(tmp_path: Path) -> None:
    manifest = build_shards(tmp_path, [50])
    for verify in ("first-touch", "off"):
        one = loader(manifest, recheck_s=0.0, verify=verify)
        before = one.batch(0)
        path = manifest.path_of(manifest.shards[0])
        path.chmod(0o640)
        os.utime(path)
        assert all(np.array_equal(a, b) for a, b in zip(before, one.batch(0), strict=True))
