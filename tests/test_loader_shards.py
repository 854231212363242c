"""Shards as the loader meets them: views that own their map, and files that are not what they were."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from builders.files import open_folder, unprivileged
from builders.shards import build_shards, build_sparse_shards, tokens_of

from apr_dist.data.loader import EvaluationLoader, TokenLoader
from apr_dist.data.manifest import Manifest
from apr_dist.errors import AprDistError, DataError, ExitCode, ManifestError, ShardError, UsageError

T = 16


def loader(manifest: Manifest, **options: object) -> TokenLoader:
    defaults = {"seq_length": T, "global_batch": 8, "micro_batch": 4, "seed": 1}
    return TokenLoader(manifest, **{**defaults, **options})  # type: ignore[arg-type]


def maps_of(folder: Path) -> list[tuple[int, int]]:
    """Address ranges of this process that are maps of files in ``folder``."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if str(folder) in line]
    return [(int(begin, 16), int(end, 16)) for begin, end in ranges]


def lies_in_map(tensor: torch.Tensor, folder: Path) -> bool:
    address = tensor.data_ptr()
    return any(begin <= address and address + tensor.nbytes <= end for begin, end in maps_of(folder))


def read_everything(manifest: Manifest, **options: object) -> None:
    list(EvaluationLoader(manifest, seq_length=T, micro_batch=4, **options))  # type: ignore[arg-type]


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-007")
def test_a_block_is_a_strided_view_of_the_map(tmp_path: Path) -> None:
    manifest = build_shards(tmp_path, [2000, 3000])
    for block in loader(manifest, shuffle="block").batch(3):
        assert block.shape == (4, T + 1)
        assert block.stride() == (T, 1)
        assert lies_in_map(block, tmp_path)
        first = int(block[0, 0])
        assert block.flatten().tolist() == [first + row * T + n for row in range(4) for n in range(T + 1)]


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-007")
def test_rows_are_views_and_batches_are_copies_of_them(tmp_path: Path) -> None:
    one = loader(build_shards(tmp_path, [2000, 3000]))
    rows, batch = one.rows(2), torch.cat(one.batch(2))
    assert all(row.shape == (T + 1,) and lies_in_map(row, tmp_path) for row in rows)
    assert torch.equal(torch.stack(rows), batch)
    assert not lies_in_map(one.batch(2)[0], tmp_path)


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-007")
def test_a_view_outlives_its_loader_and_then_frees_the_map(tmp_path: Path) -> None:
    one = loader(build_shards(tmp_path, [2000]), shuffle="block")
    view = one.batch(0)[0]
    expected = view.clone()
    one.close()
    del one
    gc.collect()
    assert torch.equal(view, expected)
    assert maps_of(tmp_path)
    del view
    assert not maps_of(tmp_path)


def test_a_gathered_batch_keeps_its_content_while_later_ones_are_made(tmp_path: Path) -> None:
    one = loader(build_shards(tmp_path, [20_000]))
    kept = [one.batch(k) for k in range(40)]
    again = loader(one._dataset)
    assert all(torch.equal(torch.cat(kept[k]), torch.cat(again.batch(k))) for k in range(40))


def test_reading_with_pread_gives_the_same_batches_and_no_views(tmp_path: Path) -> None:
    manifest = build_shards(tmp_path, [2000, 3000])
    for shuffle in ("sequence", "block"):
        mapped, read = (loader(manifest, shuffle=shuffle, access=access) for access in ("mmap", "pread"))
        assert all(torch.equal(torch.cat(mapped.batch(k)), torch.cat(read.batch(k))) for k in range(5))
    with pytest.raises(UsageError, match="access=mmap"):
        read.rows(0)


def test_more_shards_than_may_be_open_are_read_all_the_same(tmp_path: Path) -> None:
    manifest = build_shards(tmp_path, [200] * 30)
    few, many = loader(manifest, max_open_shards=3), loader(manifest)
    for k in range(many.sequences_per_epoch // 8):
        assert torch.equal(torch.cat(few.batch(k)), torch.cat(many.batch(k)))
        assert few.stats()["shards_open"] <= 3
    assert few.stats()["shards_verified"] == 30
    assert few.stats()["shards_opened"] > 30


def test_a_hundred_thousand_shards_need_no_more_maps_than_allowed(tmp_path: Path) -> None:
    manifest = build_sparse_shards(tmp_path, shards=1, tokens=10_000)
    many = Manifest(folder=tmp_path, shards=manifest.shards * 100_000, vocab_size=None, tokenizer=None)
    one = loader(many, max_open_shards=16, verify="off")
    for k in range(100):
        one.batch(k * 1_000_003)
    assert one.stats()["shards_open"] == 16
    assert len(maps_of(tmp_path)) <= 16


def test_shards_are_verified_once_when_they_are_first_touched(tmp_path: Path) -> None:
    manifest = build_shards(tmp_path, [200] * 4)
    one = loader(manifest)
    assert one.stats()["shards_verified"] == 0
    for k in range(20):
        one.batch(k)
    assert one.stats()["shards_verified"] == 4
    assert loader(manifest, verify="open").stats()["shards_verified"] == 4
    off = loader(manifest, verify="off")
    off.batch(0)
    assert off.stats()["shards_verified"] == 0


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-006")
def test_a_flipped_bit_is_refused_at_first_touch_with_both_hashes(tmp_path: Path) -> None:
    manifest = build_shards(tmp_path, [200, 200])
    path = tmp_path / "shard-00001.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ShardError, match=r"shard-00001\.bin: .*hashes to [0-9a-f]{16}.*repair-manifest"
    ) as caught:
        read_everything(manifest)
    assert caught.value.falsifier == "FALSIFY-APR-DIST-LOADER-006"
    assert manifest.shards[1].xxh3_64 in str(caught.value)
    with pytest.raises(ShardError, match=r"shard-00001\.bin"):
        loader(manifest, verify="open")
    read_everything(manifest, verify="off")


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-005")
@pytest.mark.parametrize("bytes_now", [0, 796, 798, 804])
def test_a_shard_of_another_size_than_the_manifest_says_is_refused(tmp_path: Path, bytes_now: int) -> None:
    manifest = build_shards(tmp_path, [200])
    os.truncate(tmp_path / "shard-00000.bin", bytes_now)
    with pytest.raises(ShardError, match=rf"holds {bytes_now} bytes .*Expected 800 bytes .*repair-manifest"):
        read_everything(manifest, verify="off")


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-005")
def test_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    manifest = build_shards(tmp_path, [200, 200])
    (tmp_path / "shard-00001.bin").unlink()
    with pytest.raises(ShardError, match=r"shard-00001\.bin: the shard is missing"):
        read_everything(manifest)


def test_a_folder_in_the_place_of_a_shard_is_refused(tmp_path: Path) -> None:
    manifest = build_shards(tmp_path, [200])
    (tmp_path / "shard-00000.bin").unlink()
    (tmp_path / "shard-00000.bin").mkdir()
    with pytest.raises(ShardError, match=r"shard-00000\.bin"):
        read_everything(manifest)


def test_a_data_set_without_shards_is_refused(tmp_path: Path) -> None:
    empty = Manifest(folder=tmp_path, shards=(), vocab_size=None, tokenizer=None)
    with pytest.raises(ManifestError, match="no shards"):
        loader(empty)


@pytest.mark.parametrize("options", [{"seq_length": 200}, {"shuffle": "block", "block_sequences": 16}])
def test_a_sequence_longer_than_the_data_is_refused_with_both_numbers(
    tmp_path: Path, options: dict[str, object]
) -> None:
    manifest = build_shards(tmp_path, [200, 50])
    needed = 201 if "seq_length" in options else 16 * T + 1
    with pytest.raises(DataError, match=f"holds 200 tokens. Expected at least {needed}"):
        loader(manifest, **options)


def test_the_longest_sequence_that_fits_is_read(tmp_path: Path) -> None:
    batches = list(EvaluationLoader(build_shards(tmp_path, [200, 50]), seq_length=199, micro_batch=1))
    assert [batch.tolist() for batch in batches] == [[tokens_of(0, 200).tolist()]]


def test_errors_of_the_rust_core_carry_their_exit_code(tmp_path: Path) -> None:
    manifest = build_shards(tmp_path, [200])
    (tmp_path / "shard-00000.bin").unlink()
    with pytest.raises(AprDistError) as caught:
        read_everything(manifest)
    assert caught.value.exit_code == 5
    assert caught.value.where == str(tmp_path / "shard-00000.bin")


def test_without_permission_the_file_and_the_cure_are_named() -> None:
    with open_folder() as folder, unprivileged():
        manifest = build_shards(folder / "data", [2000, 2000], hashed=False)
        shard, listing = folder / "data" / "shard-00001.bin", folder / "data" / "manifest.json"
        shard.chmod(0)
        with pytest.raises(ShardError, match=r"shard-00001\.bin: .*permission denied.* chmod u\+r") as caught:
            list(loader(manifest, max_epochs=1))
        assert caught.value.falsifier == "FALSIFY-APR-DIST-LOADER-005"
        assert caught.value.exit_code == ExitCode.DATA
        shard.chmod(0o600)
        for path in (listing, listing.parent):
            mode = path.stat().st_mode
            path.chmod(0)
            with pytest.raises(ManifestError, match=r"manifest\.json: .*permission denied.* chmod -R u\+rX"):
                Manifest.load(folder / "data")
            path.chmod(mode)
        assert Manifest.load(folder / "data").shard_count == 2
