"""Batches made ahead by a thread: the same as without it, whatever happens to files and processes."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from builders.shards import build_shards

from apr_dist.data import prefetch
from apr_dist.data.loader import TokenLoader
from apr_dist.data.manifest import Manifest
from apr_dist.errors import ShardError, StreamExhausted, UsageError

T = 16


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return build_shards(tmp_path, [2000, 3000, 500])


def loader(manifest: Manifest, **options: object) -> TokenLoader:
    defaults = {"seq_length": T, "global_batch": 16, "micro_batch": 4, "seed": 1, "recheck_s": 0.0}
    return TokenLoader(manifest, **{**defaults, **options})  # type: ignore[arg-type]


def take(one: TokenLoader, count: int) -> list[torch.Tensor]:
    """``count`` batches in order, each as one copied tensor."""
    return [torch.cat(one.next_batch()) for _ in range(count)]


def made_ahead(one: TokenLoader) -> bool:
    return "minor_faults" in one.stats()


@pytest.mark.parametrize("shuffle", ["sequence", "block"])
@pytest.mark.parametrize("access", ["mmap", "pread"])
@pytest.mark.parametrize("depth", [1, 2, 7])
def test_batches_made_ahead_are_those_made_on_demand(
    manifest: Manifest, shuffle: str, access: str, depth: int
) -> None:
    options = {"shuffle": shuffle, "access": access, "rank": 1, "world_size": 2}
    ahead = loader(manifest, prefetch_batches=depth, **options)
    demand = loader(manifest, prefetch_batches=0, **options)
    for first, second in zip(take(ahead, 60), take(demand, 60), strict=True):
        assert torch.equal(first, second)
    assert made_ahead(ahead)
    assert not made_ahead(demand)
    ahead.close()


def test_batches_taken_out_of_order_are_right_too(manifest: Manifest) -> None:
    jumping, demand = loader(manifest), loader(manifest, prefetch_batches=0)
    for k in [0, 1, 2, 3, 3, 90, 4, 5, 6, 50, 51, 52, 0, 53, 1, 2, 3]:
        assert torch.equal(torch.cat(jumping.batch(k)), torch.cat(demand.batch(k)))


def test_a_state_loaded_in_the_middle_moves_the_thread(manifest: Manifest) -> None:
    one, demand = loader(manifest), loader(manifest, prefetch_batches=0)
    take(one, 5)
    state = {**one.state(), "global_batch": 40}
    one.load_state(state)
    demand.load_state(state)
    assert all(torch.equal(a, b) for a, b in zip(take(one, 9), take(demand, 9), strict=True))


def test_tensors_kept_by_the_consumer_are_never_overwritten(manifest: Manifest) -> None:
    one = loader(manifest)
    kept = [one.next_batch() for _ in range(50)]
    again = loader(manifest, prefetch_batches=0)
    assert all(
        torch.equal(torch.cat(batch), other) for batch, other in zip(kept, take(again, 50), strict=True)
    )


def test_the_thread_ends_with_the_data_and_the_stream_says_so(manifest: Manifest) -> None:
    one = loader(manifest, max_epochs=2)
    assert len(list(one)) == 2 * one.sequences_per_epoch // 16
    with pytest.raises(StreamExhausted):
        one.next_batch()


def test_int64_batches_hold_the_same_ids(manifest: Manifest) -> None:
    wide, narrow = loader(manifest, dtype=torch.int64), loader(manifest)
    for first, second in zip(take(wide, 6), take(narrow, 6), strict=True):
        assert first.dtype == torch.int64
        assert torch.equal(first, second.long())
    with pytest.raises(UsageError, match="int32"):
        loader(manifest, dtype=torch.int64, shuffle="block")


def test_buffers_of_pytorch_are_filled_in_place(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []

    def pageable(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        made.append(torch.full(shape, -1, dtype=dtype))
        return made[-1]

    monkeypatch.setattr(prefetch, "host_buffer", pageable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for dtype in (torch.int32, torch.int64):
        pinned, demand = loader(manifest, pin_memory=True, dtype=dtype), loader(manifest, prefetch_batches=0)
        batches = [pinned.next_batch() for _ in range(12)]
        assert all(torch.equal(torch.cat(a).int(), b) for a, b in zip(batches, take(demand, 12), strict=True))
        assert {batch[0].data_ptr() for batch in batches[2:]} <= {buffer.data_ptr() for buffer in made}
        pinned.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_for_a_device_are_page_locked(manifest: Manifest) -> None:
    one, demand = loader(manifest), loader(manifest, prefetch_batches=0, pin_memory=False)
    batches = [one.next_batch() for _ in range(20)]
    assert batches[-1][0].is_pinned()
    moved = [torch.cat([micro.to("cuda", non_blocking=True) for micro in batch]) for batch in batches]
    assert all(torch.equal(a.cpu(), b) for a, b in zip(moved, take(demand, 20), strict=True))


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-010")
@pytest.mark.parametrize("shuffle", ["sequence", "block"])
@pytest.mark.parametrize("access", ["mmap", "pread"])
@pytest.mark.parametrize("depth", [0, 2])
def test_a_shard_truncated_under_the_map_is_an_error_that_names_it(
    tmp_path: Path, shuffle: str, access: str, depth: int
) -> None:
    one = loader(build_shards(tmp_path, [60_000]), shuffle=shuffle, access=access, prefetch_batches=depth)
    take(one, 5)
    os.truncate(tmp_path / "shard-00000.bin", 4096)
    with pytest.raises(ShardError, match=r"shard-00000\.bin: the shard (changed|holds 4096 bytes)"):
        take(one, 10)


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-010")
def test_truncation_is_noticed_by_the_open_map_itself(tmp_path: Path) -> None:
    one = loader(build_shards(tmp_path, [60_000]), recheck_s=3600.0, prefetch_batches=0)
    take(one, 2)
    os.truncate(tmp_path / "shard-00000.bin", 4096)
    with pytest.raises(
        ShardError, match="changed while it was in use: it held 240000 bytes and now holds 4096"
    ):
        one.next_batch()


_READ_ON_AND_ON = """
import faulthandler, sys
from pathlib import Path
from apr_dist.data.loader import TokenLoader
from apr_dist.data.manifest import Manifest
from apr_dist.errors import ShardError
manifest = Manifest.load(Path(sys.argv[1]))
one = TokenLoader(manifest, seq_length=64, global_batch=64, micro_batch=64, seed=1, recheck_s=3600.0)
for _ in range(200):
    one.next_batch()
if sys.argv[2] == "enabled late":
    faulthandler.enable()
print("ready", flush=True)
try:
    while True:
        one.next_batch()
except ShardError as error:
    print(error)
"""


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-010")
@pytest.mark.parametrize("faulthandler", ["off", "enabled early", "enabled late"])
def test_a_shard_cut_off_while_its_rows_are_copied_is_never_a_signal(
    tmp_path: Path, faulthandler: str
) -> None:
    """Whoever else handles the signal: the copy itself ends, and says which shard it was."""
    build_shards(tmp_path, [60_000, 60_000])
    early = ["-X", "faulthandler"] if faulthandler == "enabled early" else []
    command = [sys.executable, *early, "-c", _READ_ON_AND_ON, str(tmp_path), faulthandler]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        os.truncate(tmp_path / "shard-00001.bin", 0)
        told = reader.stdout.read()
    assert reader.returncode == 0
    assert (
        "shard-00001.bin: the shard changed while it was in use: it held 240000 bytes and now holds 0" in told
    )


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-010")
def test_a_replaced_shard_is_an_error_unless_its_content_is_the_same(manifest: Manifest) -> None:
    path = manifest.folder / "shard-00001.bin"
    content = path.read_bytes()
    one = loader(manifest)
    take(one, 3)
    for replacement, fits in ((content, True), (bytes(len(content)), False)):
        fresh = manifest.folder / "fresh"
        fresh.write_bytes(replacement)
        fresh.rename(path)
        if fits:
            take(one, 20)
        else:
            with pytest.raises(ShardError, match=r"shard-00001\.bin: the shard's content hashes to"):
                take(one, 20)


def test_after_an_error_the_same_batch_can_be_asked_for_again(manifest: Manifest) -> None:
    path = manifest.folder / "shard-00001.bin"
    content = path.read_bytes()
    one, demand = loader(manifest), loader(manifest, prefetch_batches=0)
    take(one, 3)
    path.write_bytes(content[:-4])
    with pytest.raises(ShardError):
        take(one, 20)
    path.write_bytes(content)
    demand.load_state(one.state())
    assert all(torch.equal(a, b) for a, b in zip(take(one, 5), take(demand, 5), strict=True))


def prefetch_threads() -> set[str]:
    tasks = Path("/proc/self/task").iterdir()
    return {task.name for task in tasks if (task / "comm").read_text().startswith("apr-dist-prefet")}


def test_closing_ends_the_thread_and_using_the_loader_starts_it_again(manifest: Manifest) -> None:
    one, demand = loader(manifest), loader(manifest, prefetch_batches=0)
    others = prefetch_threads()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(take(one, 5), take(demand, 5), strict=True))
        assert len(prefetch_threads() - others) == 1
        one.close()
        assert not prefetch_threads() - others


def test_a_forked_child_reads_on_its_own(manifest: Manifest) -> None:
    one = loader(manifest)
    take(one, 5)
    assert made_ahead(one)
    expected = take(loader_at(manifest, 5), 6)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        right = all(torch.equal(a, b) for a, b in zip(take(one, 6), expected, strict=True))
        one.close()
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert all(torch.equal(a, b) for a, b in zip(take(one, 6), expected, strict=True))


def loader_at(manifest: Manifest, k: int) -> TokenLoader:
    one = loader(manifest, prefetch_batches=0)
    one.load_state({**one.state(), "global_batch": k})
    return one


def test_a_loader_that_runs_ahead_can_be_pickled(manifest: Manifest) -> None:
    one = loader(manifest)
    take(one, 5)
    other = pickle.loads(pickle.dumps(one))
    assert all(torch.equal(a, b) for a, b in zip(take(other, 5), take(one, 5), strict=True))


def test_several_threads_may_ask_one_loader_for_different_batches(manifest: Manifest) -> None:
    one = loader(manifest, prefetch_batches=0)
    expected = take(loader(manifest, prefetch_batches=0), 40)
    wrong: list[int] = []

    def check(offset: int) -> None:
        wrong.extend(k for k in range(offset, 40, 4) if not torch.equal(torch.cat(one.batch(k)), expected[k]))

    threads = [threading.Thread(target=check, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_statistics_count_what_was_read(manifest: Manifest) -> None:
    one = loader(manifest, prefetch_batches=0)
    take(one, 10)
    stats = one.stats()
    assert stats["bytes"] == 10 * 16 * (T + 1) * 4
    assert stats["batches"] == 10
    assert stats["waits"] == 0
    assert 0 < stats["next_p50_us"] <= stats["next_p99_us"] <= stats["next_p999_us"]
    assert stats["shards_open"] == stats["shards_opened"] == stats["shards_verified"] == 3
