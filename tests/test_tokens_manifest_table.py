"""A manifest of many shards, read without an object a shard, says and refuses what a small one does."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders.shards import build_sparse_shards

from apr_dist.data.loader import TokenLoader
from apr_dist.data.manifest import Manifest
from apr_dist.errors import ManifestError, ShardError

SHARDS = 1_500


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    manifest = build_sparse_shards(tmp_path_factory.mktemp("many"), shards=SHARDS, tokens=33)
    shards = tuple(
        replace(one, sha256=f"{index:064x}", xxh3_64=f"{index:016x}", max_id=0, documents=1)
        for index, one in enumerate(manifest.shards)
    )
    replace(manifest, shards=shards).write()
    return manifest.folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """The same shards in a folder that a test may damage."""
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def in_another_layout(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())))


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-013")
def test_both_layouts_of_a_manifest_say_the_same(folder: Path) -> None:
    content = (folder / "manifest.json").read_bytes()
    quick = Manifest.load(folder)
    in_another_layout(folder)
    plain = Manifest.load(folder)
    assert (quick.shard_count, quick.total_tokens, quick.longest_shard) == (SHARDS, SHARDS * 33, 33)
    assert (plain.shard_count, plain.total_tokens, plain.longest_shard) == (SHARDS, SHARDS * 33, 33)
    assert quick.fingerprint == plain.fingerprint
    assert copy.deepcopy(quick) == quick == plain
    assert replace(quick, shards=quick.shards[:2]).total_tokens == 66
    quick.write()
    assert (folder / "manifest.json").read_bytes() == content


def test_both_layouts_give_the_same_batches(folder: Path) -> None:
    options = {"seq_length": 8, "global_batch": 4, "micro_batch": 4, "seed": 3, "verify": "off"}
    quick = TokenLoader(Manifest.load(folder), **options)  # type: ignore[arg-type]
    in_another_layout(folder)
    plain = TokenLoader(Manifest.load(folder), **options)  # type: ignore[arg-type]
    assert quick.state() == plain.state()
    for k in (0, 7, 1_000):
        assert torch.equal(quick.batch(k)[0], plain.batch(k)[0])


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-013")
@pytest.mark.parametrize(
    ("before", "after", "refusal"),
    [
        ('"shard-01234.bin"', '"../shard-01234.bin"', "plain file names"),
        ('"shard-01234.bin"', '"shard-01233.bin"', "shard-01233.bin twice"),
        ('"shard-01234.bin", "tokens": 33', '"shard-01234.bin", "tokens": -1', r"shards\.1234\.tokens"),
        ('"shard-01234.bin", "tokens": 33', '"shard-01234.bin", "tokens": 34', "total_tokens"),
        (f'"sha256": "{1234:064x}"', f'"sha256": "{1234:063x}"', r"shards\.1234\.sha256"),
        (f'"sha256": "{1234:064x}"', f'"sha256": "{7:064x}"', "fingerprint"),
        ('"schema": "apr-dist-shards-v1"', '"schema": "other"', "schema is 'other'"),
    ],
)
def test_one_wrong_shard_of_many_is_refused_by_name(
    folder: Path, before: str, after: str, refusal: str
) -> None:
    path = folder / "manifest.json"
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, after))
    with pytest.raises(ManifestError, match=refusal):
        Manifest.load(folder)


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-013")
def test_a_missing_and_a_shortened_shard_of_many_are_refused_by_name(folder: Path) -> None:
    shard = folder / "shard-01234.bin"
    shard.write_bytes(bytes(128))
    with pytest.raises(ShardError, match=r"shard-01234\.bin.*holds 128 bytes"):
        Manifest.load(folder)
    shard.unlink()
    with pytest.raises(ShardError, match=r"shard-01234\.bin.*missing"):
        Manifest.load(folder)
    assert Manifest.load(folder, check_files=False).shards[1234].file == shard.name
