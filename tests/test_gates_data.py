"""What is held out is proven to be, by its documents; and what no sequence reaches is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from builders.shards import build_shards
from builders.tokens import build_tiny_tokenizer, write_jsonl

from apr_dist.corpus.encode import encode_corpus
from apr_dist.data.manifest import Manifest
from apr_dist.errors import DataError
from apr_dist.gates.data import check_shared_documents, check_splits, check_unread

TEXTS = [f"document number {one}" for one in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_tokenizer(tmp_path_factory.mktemp("gate") / "tok")


def encode(folder: Path, tokenizer: Path, texts: list[str], *, shard_tokens: int = 100) -> Manifest:
    folder.mkdir(parents=True)
    corpus = write_jsonl(folder / "corpus.jsonl", texts)
    encode_corpus(
        sources=[corpus], tokenizer=tokenizer, output=folder / "out", shard_tokens=shard_tokens, workers=1
    )
    return Manifest.load(folder / "out")


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-018")
@pytest.mark.parametrize(
    ("held", "shared"),
    [
        (TEXTS, 60),
        (list(reversed(TEXTS)), 60),
        (TEXTS[:7] + ["new"] * 3, 7),
        (["new", TEXTS[-1]], 1),
        ([TEXTS[5]] * 4 + ["new"], 4),
    ],
)
def test_the_same_documents_on_both_sides_are_refused_whatever_their_shards(
    tmp_path: Path, tokenizer: Path, held: list[str], shared: int
) -> None:
    training = encode(tmp_path / "a", tokenizer, TEXTS)
    held_out = encode(tmp_path / "b", tokenizer, held, shard_tokens=37)
    assert not {one.sha256 for one in training.shards} & {one.sha256 for one in held_out.shards}
    said = rf"{shared} of its {len(held)} documents are also trained on.*--evaluation\.max-shared"
    with pytest.raises(DataError, match=said):
        check_shared_documents([training], held_out, limit=0)
    found, warning = check_shared_documents([training], held_out, limit=shared / len(held))
    assert found == f"{shared} of {len(held)} held-out documents trained on"
    assert warning is not None


def test_the_parts_of_a_split_share_no_document(tmp_path: Path, tokenizer: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", TEXTS * 3)
    encode_corpus(sources=[corpus], tokenizer=tokenizer, output=tmp_path / "out", val_fraction=0.3)
    training, held_out = (Manifest.load(tmp_path / "out" / part) for part in ("train", "validation"))
    found, warning = check_shared_documents([training], held_out, limit=0)
    assert found == f"0 of {held_out.total_documents} held-out documents trained on"
    assert warning is None
    check_splits([training], held_out, allowed=False)


def test_folders_without_fingerprints_are_not_called_disjoint(tmp_path: Path, tokenizer: Path) -> None:
    training, held_out = build_shards(tmp_path / "older", [99]), encode(tmp_path / "b", tokenizer, TEXTS)
    for parts, other in (([training], held_out), ([held_out], training)):
        found, warning = check_shared_documents(parts, other, limit=0)
        assert found == "documents not compared"
        assert "older: it records no document fingerprints" in str(warning)


@pytest.mark.parametrize(
    ("trained", "measured", "named"),
    [
        ("validation", "train", "validation part"),
        ("validation", "validation", "validation part"),
        ("train", "train", "train part"),
        (None, "train", "train part"),
        ("validation", None, "validation part"),
    ],
)
def test_a_part_on_the_wrong_side_is_refused_unless_allowed_by_name(
    tmp_path: Path, trained: str | None, measured: str | None, named: str
) -> None:
    training = replace(build_shards(tmp_path / "a", [50]), split=trained)
    held_out = replace(build_shards(tmp_path / "b", [50]), split=measured)
    with pytest.raises(DataError, match=rf"it is the {named}.*--loader\.any-split"):
        check_splits([training], held_out, allowed=False)
    check_splits([training], held_out, allowed=True)


@pytest.mark.parametrize(
    ("tokens", "seq_length", "block", "share"),
    [
        ([650] * 10, 400, 1, "38.4%"),
        ([1300] * 4, 655, 1, "49.6%"),
        ([1_000_000], 131_072, 1, "8.2%"),
        ([8193] * 3, 2048, 1, None),
        ([8193 + 100] * 3, 2048, 1, "1.2%"),
        ([8193] * 3, 512, 12, "25.0%"),
    ],
)
def test_what_no_sequence_reaches_is_said_and_bounded(
    tmp_path: Path, tokens: list[int], seq_length: int, block: int, share: str | None
) -> None:
    manifest = build_shards(tmp_path, tokens, hashed=False)
    warning = check_unread(manifest, seq_length=seq_length, block=block, limit=1.0)
    assert (share is None) == (warning is None)
    if share is None:
        return
    assert f"{share} of the tokens are never read" in str(warning)
    assert f"--shard-tokens {100 * seq_length * block} or more" in str(warning)
    with pytest.raises(DataError, match=rf"{share} of the tokens.*--loader\.max-unread"):
        check_unread(manifest, seq_length=seq_length, block=block, limit=0.005)


def test_the_advised_shard_size_leaves_less_than_one_percent(tmp_path: Path) -> None:
    for rest in (0, 1, 63):
        manifest = build_shards(tmp_path / str(rest), [100 * 64 + rest] * 3, hashed=False)
        assert check_unread(manifest, seq_length=64, block=1, limit=1.0) is None
