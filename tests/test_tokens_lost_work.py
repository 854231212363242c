"""Finished work is never thrown away, and half-written work is never trusted without its hash."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders.shards import build_sparse_shards
from builders.tokens import build_tiny_tokenizer, contents, write_jsonl

from apr_dist.corpus import encoding_run
from apr_dist.corpus.decode import decode_documents
from apr_dist.corpus.encode import EncodeProgress, encode_corpus
from apr_dist.corpus.repair import repair_manifest
from apr_dist.data import Manifest
from apr_dist.data.shard_files import shard_names
from apr_dist.data.verification import verify_dataset
from apr_dist.errors import CorpusError, ManifestError, OutputError, UsageError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_tokenizer(tmp_path_factory.mktemp("lost") / "tok")


@pytest.fixture
def choices(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A corpus of 400 documents, committed after every few, with two splits."""
    monkeypatch.setattr(encoding_run, "_BATCH_RECORDS", 10)
    corpus = write_jsonl(
        tmp_path / "corpus.jsonl", [f"document {one} " * (one % 23 + 1) for one in range(400)]
    )
    return {
        "sources": [corpus],
        "tokenizer": tokenizer,
        "shard_tokens": 2000,
        "val_fraction": 0.3,
        "commit_every_s": 0.0,
        "workers": 1,
    }


def break_off(output: Path, choices: dict[str, Any], *, after: int = 250) -> None:
    """Encode until about ``after`` documents are committed."""

    class Stop(Exception):
        pass

    commit = encoding_run.EncodingRun._commit

    def counted(run: encoding_run.EncodingRun) -> None:
        commit(run)
        if run.documents >= after:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding_run.EncodingRun, "_commit", counted)
        with pytest.raises(Stop):
            encode_corpus(output=output, **choices)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-017")
@pytest.mark.parametrize("damage", [cut_in_half, flip_a_bit, Path.unlink])
@pytest.mark.parametrize(
    "file", ["train/*.bin.part", "train/*.idx.part", "validation/*.docs.part", "train/*0.bin", "train/*1.idx"]
)
def test_damage_to_unfinished_work_is_noticed_and_only_that_is_done_again(
    tmp_path: Path, choices: dict[str, Any], file: str, damage: Callable[[Path], None]
) -> None:
    encode_corpus(output=tmp_path / "whole", **choices)
    break_off(tmp_path / "out", choices)
    damage(next(iter(sorted((tmp_path / "out/.encoding").glob(file)))))
    summary = encode_corpus(output=tmp_path / "out", **choices)
    assert any("damaged and are done again" in note for note in summary.notes)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert verify_dataset(tmp_path / "out").ok
    if not file.endswith(".bin"):
        assert summary.resumed_tokens > 0


@pytest.mark.parametrize("line", [1, 2, 5, -1])
def test_a_damaged_journal_is_not_believed(tmp_path: Path, choices: dict[str, Any], line: int) -> None:
    encode_corpus(output=tmp_path / "whole", **choices)
    break_off(tmp_path / "out", choices)
    journal = tmp_path / "out/.encoding/journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(b"1", b"2")
    journal.write_bytes(b"".join(lines))
    encode_corpus(output=tmp_path / "out", **choices)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_journal_without_its_first_line_is_refused_not_dropped(
    tmp_path: Path, choices: dict[str, Any]
) -> None:
    break_off(tmp_path / "out", choices)
    flip_a_bit_at_the_start = tmp_path / "out/.encoding/journal.jsonl"
    flip_a_bit_at_the_start.write_bytes(b"x" + flip_a_bit_at_the_start.read_bytes())
    with pytest.raises(OutputError, match="journal is damaged"):
        encode_corpus(output=tmp_path / "out", **choices)
    encode_corpus(output=tmp_path / "out", overwrite=True, **choices)
    assert verify_dataset(tmp_path / "out").ok


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Seven compressed files of 50 documents, too long for a look at their beginning to show damage."""
    (tmp_path / "corpus").mkdir()
    rest = " ".join(str(one * 7919 % 10007) for one in range(600))
    found = []
    for number in range(7):
        lines = "".join(json.dumps({"text": f"file {number} line {one} {rest}"}) + "\n" for one in range(50))
        found.append(tmp_path / f"corpus/{number}.jsonl.gz")
        found[-1].write_bytes(gzip.compress(lines.encode(), mtime=0))
    return found


def cut_short(path: Path) -> bytes:
    """Cut a file's end off; returns what it was."""
    content = path.read_bytes()
    path.write_bytes(content[:-30])
    return content


@pytest.mark.parametrize("broken", [[6], [3], [2, 4, 6], [0, 6]])
def test_unreadable_files_are_named_together_and_the_work_before_them_is_kept(
    tmp_path: Path, tokenizer: Path, files: list[Path], broken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding_run, "_BATCH_RECORDS", 10)
    choices: dict[str, Any] = {
        "sources": [tmp_path / "corpus"],
        "tokenizer": tokenizer,
        "commit_every_s": 0.0,
    }
    encode_corpus(output=tmp_path / "whole", **choices)
    whole = [cut_short(files[one]) for one in broken]
    named = ".*".join(rf"{one}\.jsonl\.gz" for one in broken)
    with pytest.raises(CorpusError, match=rf"{named}.*--skip-unreadable"):
        encode_corpus(output=tmp_path / "out", **choices)
    for number, content in zip(broken, whole, strict=True):
        files[number].write_bytes(content)
    seen: list[EncodeProgress] = []
    summary = encode_corpus(output=tmp_path / "out", progress=seen.append, **choices)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    texts = [one.text for one in decode_documents(tmp_path / "out")]
    kept = next(one for one in decode_documents(tmp_path / "out", start=50 * broken[0], count=1))
    assert texts[kept.number].startswith(f"file {broken[0]} line 0 ")
    before = sum(one.tokens for one in decode_documents(tmp_path / "out", count=50 * broken[0]))
    assert summary.resumed_tokens >= before - 1, "but for the end mark behind the last one"


def test_unreadable_files_are_left_out_when_asked_and_counted(
    tmp_path: Path, tokenizer: Path, files: list[Path]
) -> None:
    for number in (1, 6):
        cut_short(files[number])
    (tmp_path / "corpus/a.csv").write_text("x")
    summary = encode_corpus(
        sources=[tmp_path / "corpus"], tokenizer=tokenizer, output=tmp_path / "out", skip_unreadable=True
    )
    assert summary.documents == 250
    assert sorted(path.name for path in summary.left_out) == ["1.jsonl.gz", "6.jsonl.gz", "a.csv"]
    assert Manifest.load(tmp_path / "out").source["files_left_out"] == 3


def test_a_file_that_was_read_may_not_change_and_one_that_was_not_may(
    tmp_path: Path, tokenizer: Path, files: list[Path]
) -> None:
    choices: dict[str, Any] = {"sources": [tmp_path / "corpus"], "tokenizer": tokenizer}
    whole = cut_short(files[5])
    with pytest.raises(CorpusError):
        encode_corpus(output=tmp_path / "out", **choices)
    files[2].write_bytes(gzip.compress(b'{"text": "other"}'))
    files[5].write_bytes(whole)
    files[6].write_bytes(gzip.compress(b'{"text": "new"}'))
    with pytest.raises(OutputError, match=r"2\.jsonl\.gz is another than it was.*--force"):
        encode_corpus(output=tmp_path / "out", **choices)
    encode_corpus(output=tmp_path / "out", overwrite=True, **choices)
    assert [one.text for one in decode_documents(tmp_path / "out")][-1] == "new"


def test_the_part_that_got_documents_is_published_where_the_other_got_none(
    tmp_path: Path, tokenizer: Path
) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", [f"document {one}" for one in range(20)])
    choices: dict[str, Any] = {"sources": [corpus], "tokenizer": tokenizer, "output": tmp_path / "out"}
    encode_corpus(**choices, val_fraction=0.5)
    with pytest.raises(
        CorpusError, match=r"no document fell to the validation part.*from (0\.\d+) on"
    ) as caught:
        encode_corpus(**choices, val_fraction=1e-6, overwrite=True)
    assert Manifest.load(tmp_path / "out/train").total_documents == 20
    assert not (tmp_path / "out/validation/manifest.json").exists(), "not that of the data set before"
    fraction = float(str(caught.value).split("from ")[1].split(" on")[0])
    encode_corpus(**choices, val_fraction=fraction, overwrite=True)
    assert (Manifest.load(tmp_path / "out/validation").total_documents or 0) >= 1
    with pytest.raises(CorpusError, match=r"no document fell to the train part"):
        encode_corpus(**choices, val_fraction=1 - 1e-9, overwrite=True)
    assert Manifest.load(tmp_path / "out/validation").total_documents == 20


@pytest.mark.parametrize(
    "names",
    [
        ["shard-99999.bin", "shard-100000.bin", "shard-100001.bin"],
        ["shard-00000.bin", "shard-00001.bin", "shard-1000000.bin"],
        ["shard-2.bin", "shard-10.bin", "shard-100.bin"],
        ["shard-a2.bin", "shard-a10.bin", "shard-b1.bin"],
        ["shard-00000-of-00002.bin", "shard-00001-of-00002.bin", "shard-train.bin"],
    ],
)
def test_shards_are_ordered_by_number(tmp_path: Path, names: list[str]) -> None:
    for name in reversed(names):
        (tmp_path / name).touch()
    assert shard_names(tmp_path) == names


def test_repair_of_an_intact_folder_of_many_shards_changes_nothing(tmp_path: Path, tokenizer: Path) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", [f"document {one}" for one in range(30)])
    encode_corpus(sources=[corpus], tokenizer=tokenizer, output=tmp_path / "out", shard_tokens=20)
    manifest = Manifest.load(tmp_path / "out")
    renamed = []
    for number, shard in enumerate(manifest.shards):
        name = f"shard-{99_998 + number:05}.bin"
        for suffix in (".bin", ".idx", ".docs"):
            source = manifest.path_of(shard).with_suffix(suffix)
            source.rename((manifest.folder / name).with_suffix(suffix))
        renamed.append(name)
    path = manifest.folder / "manifest.json"
    text = path.read_text()
    for shard, name in zip(reversed(manifest.shards), reversed(renamed), strict=True):
        text = text.replace(shard.file, name)
    path.write_text(text)
    before = Manifest.load(manifest.folder)
    report = repair_manifest(manifest.folder)
    assert report.changed == ()
    assert report.manifest.fingerprint == before.fingerprint
    assert report.manifest.has_index
    assert verify_dataset(manifest.folder).ok


@pytest.mark.parametrize("manifest_too", [True, False])
@pytest.mark.parametrize("lost", ["shard-00003.bin", "shard-00000.bin"])
def test_repair_names_a_gap_and_needs_to_be_told_to_accept_it(
    tmp_path: Path, manifest_too: bool, lost: str
) -> None:
    manifest = build_sparse_shards(tmp_path, shards=15, tokens=9)
    manifest.write()
    (tmp_path / lost).unlink()
    if manifest_too:
        (tmp_path / "manifest.json").unlink()
    with pytest.raises(ManifestError, match=rf"1 shard\(s\) are missing, such as {lost}.*--accept-loss"):
        repair_manifest(tmp_path)
    assert repair_manifest(tmp_path, accept_loss=True).manifest.shard_count == 14
    assert repair_manifest(tmp_path).manifest.shard_count == 14, "what was accepted once is no gap"


@pytest.mark.parametrize("lost", [[4], [3, 4], [0, 4], [2], [1, 2, 3]])
def test_repair_without_a_manifest_notices_lost_shards_by_what_lies_beside_them(
    tmp_path: Path, tokenizer: Path, lost: list[int]
) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", [f"document {one}" for one in range(30)])
    encode_corpus(sources=[corpus], tokenizer=tokenizer, output=tmp_path / "out", shard_tokens=20)
    manifest = Manifest.load(tmp_path / "out")
    last = manifest.shard_count - 1
    gone = [manifest.shards[last if one == 4 else one] for one in lost]
    for shard in gone:
        manifest.path_of(shard).unlink()
    (tmp_path / "out/manifest.json").unlink()
    said = rf"{len(lost)} shard\(s\) are missing, such as {min(one.file for one in gone)}.*--accept-loss"
    with pytest.raises(ManifestError, match=said):
        repair_manifest(tmp_path / "out")
    found = repair_manifest(tmp_path / "out", accept_loss=True).manifest
    assert found.shard_count == manifest.shard_count - len(lost)


@pytest.mark.parametrize(
    ("fraction", "documents", "part"),
    [
        (1e-9, 5, "train"),
        (0.5, 1, "train"),
        (0.999, 3, "validation"),
        (0.01, 2, "train"),
        (1 - 1e-12, 4, "validation"),
    ],
)
def test_a_fraction_that_leaves_a_part_empty_keeps_the_other_and_says_so(
    tmp_path: Path, tokenizer: Path, fraction: float, documents: int, part: str
) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", [f"doc {one}" for one in range(documents)])
    with pytest.raises(CorpusError, match=rf"{documents} documents in all.*out/{part} is complete"):
        encode_corpus(sources=[corpus], tokenizer=tokenizer, output=tmp_path / "out", val_fraction=fraction)
    assert Manifest.load(tmp_path / "out" / part).total_documents == documents


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 7.0, float("nan"), float("inf")])
def test_a_fraction_that_is_none_is_refused_before_anything_is_read(
    tmp_path: Path, tokenizer: Path, fraction: float
) -> None:
    with pytest.raises(UsageError, match=r"--val-fraction is"):
        encode_corpus(
            sources=[tmp_path / "none.jsonl"],
            tokenizer=tokenizer,
            output=tmp_path / "out",
            val_fraction=fraction,
        )
    assert not (tmp_path / "out").exists()
