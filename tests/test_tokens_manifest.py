"""What manifest.json promises, and every way in which a folder can break the promise."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders.tokens import build_tiny_dataset, build_tiny_tokenizer

from apr_dist.data import Manifest
from apr_dist.data.manifest_file import OLDER_SCHEMA
from apr_dist.errors import ManifestError, OutputError, ShardError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("manifest")
    return build_tiny_dataset(root / "data", build_tiny_tokenizer(root / "tok"), files=24, shard_tokens=8_000)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the training part that a test may damage."""
    copy = tmp_path / "train"
    copy.mkdir()
    for path in (made / "train").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def older_folder(folder: Path, shards: list[list[int]], **fields: object) -> Path:
    folder.mkdir()
    for number, ids in enumerate(shards):
        np.array(ids, dtype="<u4").tofile(folder / f"shard-{number:05}.bin")
    recorded = {"schema": OLDER_SCHEMA, "shard_count": len(shards), "vocab_size": 50, "tokenizer_dir": "tok"}
    recorded |= {"total_tokens": sum(map(len, shards))} | fields
    (folder / "manifest.json").write_text(json.dumps(recorded))
    return folder


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "manifest.json"
    recorded = json.loads(path.read_text())
    change(recorded)
    path.write_text(json.dumps(recorded))


def test_a_manifest_says_what_the_shards_hold(made: Path) -> None:
    manifest = Manifest.load(made / "train")
    assert manifest.split == "train"
    assert len(manifest.shards) > 2
    assert manifest.warnings == ()
    documents = 0
    for shard in manifest.shards:
        ids = np.fromfile(made / "train" / shard.file, dtype="<u4")
        assert (shard.tokens, shard.bytes) == (ids.size, ids.nbytes)
        assert (shard.min_id, shard.max_id) == (ids.min(), ids.max())
        documents += shard.documents or 0
    assert manifest.total_tokens == sum(shard.tokens for shard in manifest.shards)
    assert manifest.total_documents == documents
    assert manifest.max_token_id == max(shard.max_id or 0 for shard in manifest.shards)


def test_the_keys_of_the_older_schema_are_kept_for_its_readers(made: Path) -> None:
    recorded = json.loads((made / "train" / "manifest.json").read_text())
    assert recorded["schema"] == "apr-dist-shards-v1"
    assert recorded["dtype"] == "u32le"
    assert recorded["shard_count"] == len(recorded["shards"])
    assert {"total_tokens", "total_documents", "vocab_size", "tokenizer_dir", "created_at"} <= recorded.keys()
    assert {"sha256", "bpe_vocab_count", "added_tokens_count", "effective_vocab_count"} <= recorded[
        "tokenizer"
    ].keys()


def test_writing_a_loaded_manifest_again_changes_nothing(folder: Path) -> None:
    before = (folder / "manifest.json").read_bytes()
    Manifest.load(folder).write()
    assert (folder / "manifest.json").read_bytes() == before


def test_the_fingerprint_follows_content_order_and_tokenizer(made: Path) -> None:
    manifest = Manifest.load(made / "train")
    other_order = replace(manifest, shards=manifest.shards[::-1])
    assert manifest.tokenizer is not None
    other_tokenizer = replace(manifest, tokenizer=replace(manifest.tokenizer, sha256="0" * 64))
    validation = Manifest.load(made / "validation")
    prints = {one.fingerprint for one in (manifest, other_order, other_tokenizer, validation)}
    assert len(prints) == 4
    assert replace(manifest, created_at="2001-01-01T00:00:00+00:00").fingerprint == manifest.fingerprint


def test_document_starts_lie_where_documents_begin(made: Path) -> None:
    manifest = Manifest.load(made / "train")
    for shard in manifest.shards:
        starts = manifest.document_starts(shard)
        ids = np.fromfile(made / "train" / shard.file, dtype="<u4")
        assert starts[0] == 0
        assert (ids[starts[1:] - 1] == manifest.eos_token_id).all()


def test_a_folder_without_manifest_names_the_command_that_makes_one(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(ManifestError, match=r"no manifest\.json.*repair-manifest"):
        Manifest.load(folder)


def test_the_folder_above_the_parts_names_its_parts(made: Path) -> None:
    with pytest.raises(ManifestError, match=r"name one of its parts: .*train"):
        Manifest.load(made)


def test_a_missing_folder_and_a_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such folder"):
        Manifest.load(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(ManifestError, match="a file stands there"):
        Manifest.load(tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'"text"', b'{"schema": 3}'])
def test_a_malformed_manifest_is_refused(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ManifestError, match="repair-manifest"):
        Manifest.load(folder)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("schema", "other-v9", "schema is 'other-v9'"),
        ("dtype", "u16le", "u32le"),
        ("shard_count", 99, "shard_count is 99"),
        ("total_tokens", 1, "total_tokens is 1"),
        ("fingerprint", "0" * 64, "fingerprint"),
        ("vocab_size", -1, "vocab_size"),
        ("vocab_size", "512", "vocab_size"),
        ("shards", [], "holds no shards"),
        ("shards", "none", "shards"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    folder: Path, key: str, value: object, text: str
) -> None:
    edit(folder, lambda recorded: recorded.update({key: value}))
    with pytest.raises(ManifestError, match=text):
        Manifest.load(folder)


@pytest.mark.parametrize(
    "name", ["../shard-00000.bin", "a/b.bin", "..", ".", "", "a\\b.bin", "/etc/passwd", "x\0"]
)
def test_a_file_name_that_is_not_plain_is_refused(folder: Path, name: str) -> None:
    edit(folder, lambda recorded: recorded["shards"][0].update(file=name))
    with pytest.raises(ManifestError):
        Manifest.load(folder)


def test_a_link_out_of_the_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere.bin"
    outside.write_bytes((folder / "shard-00001.bin").read_bytes())
    (folder / "shard-00001.bin").unlink()
    (folder / "shard-00001.bin").symlink_to(outside)
    with pytest.raises(ManifestError, match="link to"):
        Manifest.load(folder)


def test_a_shard_named_twice_is_refused(folder: Path) -> None:
    edit(folder, lambda recorded: recorded["shards"].append(recorded["shards"][0]))
    with pytest.raises(ManifestError, match=r"shard-00000\.bin twice"):
        Manifest.load(folder)


def test_a_bad_hash_field_is_refused(folder: Path) -> None:
    edit(folder, lambda recorded: recorded["shards"][0].update(xxh3_64="xyz"))
    with pytest.raises(ManifestError, match="xxh3_64"):
        Manifest.load(folder)


@pytest.mark.parametrize("change", [-4, -3, 4])
def test_a_shard_of_another_size_is_refused_with_both_sizes(folder: Path, change: int) -> None:
    path = folder / "shard-00001.bin"
    content = path.read_bytes()
    path.write_bytes((content + b"\0" * 4)[: len(content) + change])
    text = (
        rf"shard-00001\.bin: the shard holds {len(content) + change} bytes.*{len(content)}.*repair-manifest"
    )
    with pytest.raises(ShardError, match=text):
        Manifest.load(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "shard-00001.bin").unlink()
    with pytest.raises(ShardError, match=r"shard-00001\.bin: the shard is missing"):
        Manifest.load(folder)
    assert Manifest.load(folder, check_files=False).shards[1].file == "shard-00001.bin"


def test_a_damaged_document_index_is_named(folder: Path) -> None:
    manifest = Manifest.load(folder)
    (folder / "shard-00000.idx").write_bytes(b"\0" * 12)
    with pytest.raises(ShardError, match=r"shard-00000\.idx: the document index holds 12 bytes"):
        manifest.document_starts(manifest.shards[0])
    (folder / "shard-00000.idx").unlink()
    with pytest.raises(ShardError, match="cannot be read"):
        manifest.document_starts(manifest.shards[0])


def test_a_folder_of_the_older_schema_opens_with_a_warning(tmp_path: Path) -> None:
    folder = older_folder(tmp_path / "old", [[1, 2, 3], [4, 5]], total_documents=2)
    manifest = Manifest.load(folder)
    assert [shard.tokens for shard in manifest.shards] == [3, 2]
    assert (manifest.vocab_size, manifest.total_documents, manifest.max_token_id) == (50, 2, None)
    assert "names and sizes" in manifest.warnings[0]
    assert manifest.shards[0].xxh3_64 is None
    with pytest.raises(ShardError, match="no document boundaries"):
        manifest.document_starts(manifest.shards[0])
    before = manifest.fingerprint
    np.array([1], dtype="<u4").tofile(folder / "shard-00001.bin")
    edit(folder, lambda recorded: recorded.update(total_tokens=4))
    assert Manifest.load(folder).fingerprint != before


def test_an_older_folder_that_lost_a_shard_or_a_byte_is_refused(tmp_path: Path) -> None:
    folder = older_folder(tmp_path / "old", [[1, 2, 3], [4, 5]])
    (folder / "shard-00001.bin").write_bytes(b"\0" * 7)
    with pytest.raises(ShardError, match=r"7 bytes.*whole tokens"):
        Manifest.load(folder)
    (folder / "shard-00001.bin").unlink()
    with pytest.raises(ManifestError, match="shard_count is 2"):
        Manifest.load(folder)
    (folder / "shard-00000.bin").unlink()
    with pytest.raises(ManifestError, match="no shards"):
        Manifest.load(folder)


def test_an_empty_shard_of_an_older_folder_is_no_obstacle(tmp_path: Path) -> None:
    manifest = Manifest.load(older_folder(tmp_path / "old", [[1, 2, 3], []]))
    assert [shard.tokens for shard in manifest.shards] == [3, 0]


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(folder: Path) -> None:
    before = (folder / "manifest.json").read_bytes()
    manifest = replace(Manifest.load(folder), folder=folder / "absent")
    with pytest.raises(OutputError, match="cannot be written"):
        manifest.write()
    assert (folder / "manifest.json").read_bytes() == before
    assert not list(folder.glob(".*tmp"))
