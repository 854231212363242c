"""Verify finds every kind of damage, repair rebuilds what can be known, decode shows documents back."""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders.tokens import build_tiny_dataset, build_tiny_tokenizer, write_jsonl

from apr_dist.corpus.decode import decode_documents
from apr_dist.corpus.encode import EosPolicy, encode_corpus
from apr_dist.corpus.repair import repair_manifest
from apr_dist.data import Manifest
from apr_dist.data.shard_files import read_shard_facts
from apr_dist.data.verification import verify_dataset
from apr_dist.errors import ManifestError, ShardError, TokenizerError, UsageError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_tokenizer(tmp_path_factory.mktemp("verify") / "tok")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    return build_tiny_dataset(
        tmp_path_factory.mktemp("verify") / "data", tokenizer, files=24, shard_tokens=8_000
    )


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    """A copy of the whole data set that a test may damage."""
    for path in made.rglob("*.*"):
        (tmp_path / "data" / path.relative_to(made)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / path.relative_to(made)).write_bytes(path.read_bytes())
    return tmp_path / "data"


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def set_ids(path: Path, place: int, value: int) -> None:
    ids = np.fromfile(path, dtype="<u4")
    ids[place] = value
    ids.tofile(path)


def remeasure(folder: Path) -> None:
    """Record the shards as they are now, leaving everything else as it was."""
    manifest = Manifest.load(folder)
    shards = tuple(read_shard_facts(folder, shard.file) for shard in manifest.shards)
    replace(manifest, shards=shards).write()


def move_last_id_to_the_next_shard(folder: Path) -> None:
    """As an older writer lays a document's end id at a shard boundary."""
    first, second = (np.fromfile(folder / f"shard-0000{one}.bin", dtype="<u4") for one in (0, 1))
    first[:-1].tofile(folder / "shard-00000.bin")
    np.append(first[-1:], second).tofile(folder / "shard-00001.bin")


def older_manifest(folder: Path, tokens: int) -> None:
    recorded = {"schema": "pretokenize-bin-v1", "total_tokens": tokens, "vocab_size": 512}
    (folder / "manifest.json").write_text(json.dumps(recorded))


def test_a_fresh_data_set_is_what_its_manifests_say(made: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify_dataset(made, progress=lambda done, total: seen.append((done, total)))
    assert report.ok
    assert report.unchecked == ()
    assert [folder.name for folder in report.folders] == ["train", "validation"]
    assert report.tokens * 4 == seen[-1][0] == seen[-1][1]
    assert report.shards == len(seen) > 3


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda train: flip(train / "shard-00001.bin", 77), r"shard-00001\.bin: its xxh3_64 is"),
        (lambda train: flip(train / "shard-00001.bin", 77), r"shard-00001\.bin: its sha256 is"),
        (lambda train: flip(train / "shard-00001.idx", 8), r"shard-00001\.bin: its index_xxh3_64 is"),
        (lambda train: (train / "shard-00001.idx").unlink(), r"shard-00001\.idx: the document index cannot"),
        (lambda train: (train / "shard-00001.bin").unlink(), r"shard-00001\.bin: the shard cannot be read"),
        (lambda train: (train / "shard-00001.bin").write_bytes(b"123"), r"holds 3 bytes"),
        (lambda train: (train / "shard-99999.bin").touch(), r"shards are not in the manifest.*99999"),
        (lambda train: set_ids(train / "shard-00001.bin", 5, 512), r"holds the id 512.*below 512"),
    ],
)
def test_verify_names_what_is_damaged(data: Path, damage: Callable[[Path], object], text: str) -> None:
    damage(data / "train")
    report = verify_dataset(data)
    assert not report.ok
    assert any(re.search(text, str(problem)) for problem in report.problems)


def test_verify_finds_document_boundaries_that_do_not_fit(data: Path) -> None:
    manifest = Manifest.load(data / "train")
    starts = manifest.document_starts(manifest.shards[0])
    starts[1] += 1
    starts.tofile(data / "train/shard-00000.idx")
    remeasure(data / "train")
    (problem,) = verify_dataset(data).problems
    assert "1 documents do not end with the id 0" in str(problem)
    starts[1] = 0
    starts.tofile(data / "train/shard-00000.idx")
    remeasure(data / "train")
    (problem,) = verify_dataset(data).problems
    assert "do not rise" in str(problem)


def test_verify_says_what_an_older_folder_leaves_unchecked(data: Path) -> None:
    tokens = Manifest.load(data / "train").total_tokens
    for path in (data / "train").glob("*.idx"):
        path.unlink()
    older_manifest(data / "train", tokens)
    report = verify_dataset(data / "train")
    assert report.ok
    assert "records nothing per shard" in report.unchecked[0]
    set_ids(data / "train/shard-00000.bin", 0, 512)
    assert not verify_dataset(data / "train").ok


def test_verify_without_a_manifest_has_nothing_to_check_against(data: Path) -> None:
    (data / "train/manifest.json").unlink()
    with pytest.raises(ManifestError, match="repair-manifest"):
        verify_dataset(data / "train")
    with pytest.raises(ManifestError, match="repair-manifest"):
        verify_dataset(data)


@pytest.mark.falsifies(
    "FALSIFY-REPAIR-MANIFEST-001",
    "FALSIFY-REPAIR-MANIFEST-002",
    "FALSIFY-REPAIR-MANIFEST-003",
    "FALSIFY-REPAIR-MANIFEST-004",
)
def test_a_lost_manifest_is_rebuilt_from_the_shards(data: Path) -> None:
    folder = data / "train"
    (folder / "manifest.json").unlink()
    report = repair_manifest(folder)
    recorded = json.loads((folder / "manifest.json").read_text())
    shards = sorted(folder.glob("shard-*.bin"))
    assert recorded["shard_count"] == len(shards)
    assert recorded["total_tokens"] == sum(path.stat().st_size for path in shards) // 4
    assert recorded["schema"] == "apr-dist-shards-v1"
    assert recorded["repair"] is True
    assert datetime.datetime.fromisoformat(recorded["repaired_at"]).tzinfo is not None
    assert report.changed == ("there was no manifest",)
    assert "the tokenizer" in report.unknown
    assert "document boundaries" not in report.unknown


@pytest.mark.falsifies("FALSIFY-REPAIR-MANIFEST-005")
def test_a_repaired_folder_opens_and_verifies(data: Path, tokenizer: Path) -> None:
    before = Manifest.load(data / "train")
    (data / "train/manifest.json").unlink()
    repair_manifest(data / "train", tokenizer=tokenizer)
    after = Manifest.load(data / "train")
    assert after.shards == before.shards
    assert after.fingerprint == before.fingerprint
    assert after.vocab_size == 512
    assert "rebuilt" in after.warnings[0]
    assert verify_dataset(data).ok


@pytest.mark.falsifies("FALSIFY-REPAIR-MANIFEST-006")
def test_repairing_twice_changes_only_the_time(data: Path, tokenizer: Path) -> None:
    (data / "train/manifest.json").unlink()
    recorded = []
    for _ in range(2):
        repair_manifest(data / "train", tokenizer=tokenizer)
        recorded.append(json.loads((data / "train/manifest.json").read_text()))
        recorded[-1].pop("repaired_at")
    assert recorded[0] == recorded[1]


def test_a_repair_keeps_what_the_old_manifest_knew_and_says_what_changed(data: Path) -> None:
    folder = data / "train"
    before = Manifest.load(folder)
    set_ids(folder / "shard-00001.bin", 3, 7)
    (folder / "shard-00002.bin").unlink()
    (folder / "shard-00002.idx").unlink()
    report = repair_manifest(folder, accept_loss=True)
    assert report.changed == ("shard-00002.bin is gone", "shard-00001.bin is not as it was recorded")
    after = Manifest.load(folder)
    assert (after.tokenizer, after.split, after.eos_policy) == (before.tokenizer, "train", "between")
    assert after.fingerprint != before.fingerprint
    assert report.unknown == ()


def test_a_repair_takes_in_a_folder_of_the_older_schema(data: Path) -> None:
    folder = data / "train"
    tokens = Manifest.load(folder).total_tokens
    for path in folder.glob("*.idx"):
        path.unlink()
    older_manifest(folder, tokens)
    report = repair_manifest(folder)
    assert "the schema was pretokenize-bin-v1" in report.changed
    manifest = Manifest.load(folder)
    assert manifest.vocab_size == 512
    assert manifest.max_token_id == 511
    assert not manifest.has_index
    assert "document boundaries" in report.unknown


def test_an_unreadable_manifest_is_replaced_and_its_fault_told(data: Path) -> None:
    (data / "train/manifest.json").write_text("{broken")
    assert "could not be used" in repair_manifest(data / "train").changed[0]
    assert Manifest.load(data / "train").shards


def test_a_torn_shard_is_not_repaired(data: Path) -> None:
    path = data / "train/shard-00001.bin"
    path.write_bytes(path.read_bytes()[:-1])
    before = (data / "train/manifest.json").read_bytes()
    with pytest.raises(ShardError, match=r"shard-00001\.bin.*whole tokens of 4 bytes"):
        repair_manifest(data / "train")
    assert (data / "train/manifest.json").read_bytes() == before


def test_ids_beyond_the_vocabulary_are_not_repaired_over(data: Path) -> None:
    set_ids(data / "train/shard-00001.bin", 3, 100_000)
    with pytest.raises(ShardError, match=r"the id 100000.*below 512"):
        repair_manifest(data / "train")


def test_a_folder_without_shards_is_not_repaired(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"holds no shards.*data/train"):
        repair_manifest(data)
    with pytest.raises(ManifestError, match="no such folder"):
        repair_manifest(tmp_path / "absent")
    (tmp_path / "unfinished/.encoding").mkdir(parents=True)
    with pytest.raises(ManifestError, match="goes on where it was"):
        repair_manifest(tmp_path / "unfinished")


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """Ten documents over several shards."""
    root = tmp_path_factory.mktemp("lines")
    corpus = write_jsonl(root / "a.jsonl", [f"document number {one}\n" for one in range(10)])
    encode_corpus(sources=[corpus], tokenizer=tokenizer, output=root / "out", shard_tokens=30)
    return root / "out"


def test_any_documents_can_be_shown(lines: Path, tokenizer: Path) -> None:
    assert len(Manifest.load(lines).shards) > 2
    found = list(decode_documents(lines, start=3, count=4))
    assert [(one.number, one.text) for one in found] == [
        (one, f"document number {one}\n") for one in range(3, 7)
    ]
    assert [one.number for one in decode_documents(lines, tokenizer=tokenizer, start=9)] == [9]
    assert list(decode_documents(lines, count=0)) == []
    with pytest.raises(UsageError, match=r"document 10 .*0 to 9"):
        list(decode_documents(lines, start=10))
    with pytest.raises(UsageError):
        list(decode_documents(lines, start=-1))


def test_another_tokenizer_is_not_used_to_decode(lines: Path, tmp_path: Path) -> None:
    other = build_tiny_tokenizer(tmp_path / "other", vocab_size=300)
    with pytest.raises(TokenizerError, match="not the tokenizer the shards were made with"):
        next(decode_documents(lines, tokenizer=other))


@pytest.mark.parametrize("policy", [EosPolicy.BETWEEN, EosPolicy.AFTER])
def test_documents_of_an_older_folder_end_at_the_end_id(
    tmp_path: Path, tokenizer: Path, policy: EosPolicy
) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", [f"document number {one}\n" for one in range(10)])
    folder = tmp_path / "out"
    encode_corpus(sources=[corpus], tokenizer=tokenizer, output=folder, shard_tokens=30, eos_policy=policy)
    tokens = Manifest.load(folder).total_tokens
    for path in folder.glob("*.idx"):
        path.unlink()
    older_manifest(folder, tokens)
    np.array([], dtype="<u4").tofile(folder / "shard-00099.bin")
    move_last_id_to_the_next_shard(folder)
    found = [one.text for one in decode_documents(folder, tokenizer=tokenizer)]
    assert found == [f"document number {one}\n" for one in range(10)]
    with pytest.raises(TokenizerError, match="--tokenizer"):
        next(decode_documents(folder))


def test_a_document_index_that_no_longer_fits_its_shard_is_not_taken_over(data: Path) -> None:
    folder = data / "train"
    os.truncate(folder / "shard-00000.bin", 40)
    report = repair_manifest(folder)
    assert any("document starts do not rise" in text for text in report.changed)
    assert sum("is not as it was recorded" in text for text in report.changed) == 1
    assert "document boundaries" in report.unknown
    assert not Manifest.load(folder).has_index
    assert verify_dataset(folder).ok
    assert repair_manifest(folder).changed == ()


@pytest.mark.parametrize("suffix", [".idx", ".docs"])
def test_a_changed_sidecar_is_not_believed(data: Path, suffix: str) -> None:
    manifest = Manifest.load(data / "train")
    shard = manifest.shards[0]
    path = manifest.path_of(shard).with_suffix(suffix)
    content = bytearray(path.read_bytes())
    content[9] ^= 1
    path.write_bytes(content)
    read = manifest.document_starts if suffix == ".idx" else manifest.document_fingerprints
    with pytest.raises(ShardError, match=r"is not as it was recorded.*repair-manifest"):
        read(shard)
    assert not verify_dataset(data / "train").ok
