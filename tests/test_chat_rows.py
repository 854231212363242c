"""Rows of conversations: flags in the words, packing, and what the loader and other readers make of them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.chat_rows import PAD, Turns, build_rows, made_up
from builders.shards import build_shards_of
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_dist.corpus.packing import pack
from apr_dist.corpus.repair import repair_manifest
from apr_dist.corpus.row_writer import TooLong
from apr_dist.data.evaluation_loader import EvaluationLoader
from apr_dist.data.loader import Mixture, Source, TokenLoader
from apr_dist.data.manifest import Manifest
from apr_dist.data.verification import verify_dataset
from apr_dist.errors import DataError, ManifestError, ShardError
from apr_dist.training.evaluation import split_sequences

T, V = 32, 500
CPU = torch.device("cpu")


def words_of(manifest: Manifest) -> list[int]:
    """All words of a folder, as plain numbers."""
    return [
        word
        for shard in manifest.shards
        for word in np.fromfile(manifest.path_of(shard), dtype="<u4").tolist()
    ]


def spans_in(words: list[int]) -> list[tuple[list[int], list[bool]]]:
    """Ids and targets of every span that a flag begins, by plain arithmetic."""
    spans: list[tuple[list[int], list[bool]]] = []
    for word in words:
        if word // 2**30 % 2:
            spans.append(([], []))
        spans[-1][0].append(word % 2**30)
        spans[-1][1].append(word // 2**31 == 0)
    return spans


def as_span(turns: Turns) -> tuple[list[int], list[bool]]:
    return turns.ids.tolist(), turns.is_target.tolist()


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-014")
def test_every_conversation_is_in_the_rows_once_and_whole(tmp_path: Path) -> None:
    turns = made_up(400, vocab_size=V, longest=T)
    manifest = build_rows(tmp_path / "rows", turns, T, vocab_size=V, shard_tokens=2_000)
    spans = [span for span in spans_in(words_of(manifest)) if any(span[1])]
    assert sorted(spans) == sorted(as_span(one) for one in turns)
    assert manifest.conversations is not None
    assert manifest.shard_count > 1
    assert manifest.conversations.fill >= 0.97
    assert manifest.conversations.targets == sum(one.is_target.sum() for one in turns)
    assert sum(shard.targets or 0 for shard in manifest.shards) == manifest.conversations.targets
    assert verify_dataset(manifest.folder).ok


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=120), st.integers(50, 64))
def test_packing_keeps_every_item_and_no_row_is_too_full(lengths: list[int], capacity: int) -> None:
    rows = pack(lengths, capacity)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    loads = [sum(lengths[item] for item in row) for row in rows]
    assert all(load <= capacity for load in loads)
    # Best fit never leaves two rows that would fit into one.
    assert all(first + second > capacity for i, first in enumerate(loads) for second in loads[:i])


def test_lengths_as_of_real_chats_fill_the_rows(tmp_path: Path) -> None:
    draw = random.Random(1)
    lengths = [min(2048, max(8, int(draw.lognormvariate(5.3, 0.9)))) for _ in range(20_000)]
    rows = pack(lengths, 2048)
    assert sum(lengths) / (len(rows) * 2048) >= 0.99


@pytest.mark.parametrize("too_long", list(TooLong))
def test_what_is_longer_than_a_row_is_treated_as_asked_and_counted(tmp_path: Path, too_long: TooLong) -> None:
    turns = made_up(40, vocab_size=V, longest=5 * T, shortest=T // 2)
    long = [one for one in turns if one.ids.size > T]
    manifest = build_rows(tmp_path / "rows", turns, T, vocab_size=V, too_long=too_long)
    facts = manifest.conversations
    assert facts is not None
    assert long
    name = {"truncate": "truncated", "drop": "dropped", "split": "split"}[too_long.value]
    assert facts.counts[name] == len(long)
    every = sum(int(one.is_target.sum()) for one in turns)
    if too_long is TooLong.SPLIT:
        assert facts.targets == every, "a cut lost a target"
    elif too_long is TooLong.DROP:
        assert facts.targets == every - sum(int(one.is_target.sum()) for one in long)
    else:
        assert facts.targets == sum(int(one.is_target[:T].sum()) for one in turns)
    assert verify_dataset(manifest.folder).ok


def test_without_packing_each_conversation_has_a_row(tmp_path: Path) -> None:
    turns = made_up(7, vocab_size=V, longest=T)
    manifest = build_rows(tmp_path / "rows", turns, T, vocab_size=V, packed=False)
    words = np.array(words_of(manifest))[:-1].reshape(7, T)
    for row, one in zip(words.tolist(), turns, strict=True):
        assert spans_in(row)[0] == as_span(one)
        assert all(word % 2**30 == PAD and word // 2**31 for word in row[one.ids.size :])


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-014")
@pytest.mark.parametrize("shuffle", ["sequence", "block", "none"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_batches_give_inputs_targets_and_boundaries(tmp_path: Path, shuffle: str, dtype: torch.dtype) -> None:
    if shuffle == "block" and dtype == torch.int64:
        pytest.skip("views are 32-bit")
    turns = made_up(300, vocab_size=V, longest=T)
    manifest = build_rows(tmp_path / "rows", turns, T, vocab_size=V, shard_tokens=1_500)
    loader = TokenLoader(
        manifest, seq_length=T, global_batch=8, micro_batch=2, seed=3, shuffle=shuffle, dtype=dtype
    )
    assert loader.flagged
    fresh = TokenLoader(manifest, seq_length=T, global_batch=8, micro_batch=2, seed=3, shuffle=shuffle)
    for k in range(12 if shuffle != "none" else loader.sequences_per_epoch // 8):
        for raw, documents, again in zip(
            loader.batch(k), loader.documents(k), fresh.documents(k), strict=True
        ):
            batch = split_sequences(raw, CPU, documents=documents, flagged=True)
            assert torch.equal(documents.cu_seqlens, again.cu_seqlens), "made ahead or now, one answer"
            rows = [[word % 2**32 for word in row] for row in raw.tolist()]
            assert batch.inputs.tolist() == [[word % 2**30 for word in row[:-1]] for row in rows]
            assert batch.targets.tolist() == [
                [-100 if word // 2**31 else word % 2**30 for word in row[1:]] for row in rows
            ]
            begins = [
                i * T + j for i, row in enumerate(rows) for j in range(T) if j == 0 or row[j] // 2**30 % 2
            ]
            assert documents.cu_seqlens.tolist() == [*begins, len(rows) * T]
            assert batch.document_ids is not None
            positions = batch.document_ids.positions()
            assert positions.tolist() == documents.positions.tolist()
            assert int(positions.max()) < T


def test_a_batch_made_ahead_brings_its_boundaries_along(tmp_path: Path) -> None:
    manifest = build_rows(tmp_path / "rows", made_up(300, vocab_size=V, longest=T), T, vocab_size=V)
    loader = TokenLoader(manifest, seq_length=T, global_batch=4, micro_batch=4, seed=0)
    for k in range(5):
        loader.batch(k)
    read = loader.stats()["bytes"]
    loader.documents(4)
    assert loader.stats()["bytes"] - read <= 4 * 4 * (T + 1) * 8, "it was gathered again"
    assert loader._ahead is not None
    assert loader._ahead.made == 4


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-014")
def test_conversations_and_plain_text_mix_by_weight(tmp_path: Path) -> None:
    chats = build_rows(tmp_path / "chats", made_up(300, vocab_size=V, longest=T), T, vocab_size=V)
    plain_ids = np.arange(9_000, dtype=np.uint32) % V
    plain = build_shards_of(tmp_path / "plain", [plain_ids], eos_id=7)
    mixture = Mixture((Source("chats", chats, 1.0), Source("plain", plain, 3.0)))
    loader = TokenLoader(mixture, seq_length=T, global_batch=16, micro_batch=16, seed=0)
    of_chats = 0
    for k in range(50):
        (raw,), (documents,), (apart,) = (
            loader.batch(k),
            loader.documents(k, plain=False),
            loader.documents(k),
        )
        batch = split_sequences(raw, CPU, documents=documents, flagged=True)
        is_chat = (raw >> 30).any(dim=1)
        of_chats += int(is_chat.sum())
        assert int(batch.inputs.max()) < V
        assert bool((batch.targets[~is_chat] != -100).all()), "every token of plain text is a target"
        assert bool((documents.ids[~is_chat] == 0).all()), "plain text is one document a row"
        ends = raw[~is_chat][:, :-1] == 7
        expected = torch.nn.functional.pad(ends.int().cumsum(1), (1, 0))[:, :-1]
        assert torch.equal(apart.ids[~is_chat], expected.to(torch.int32)), "unless asked otherwise"
        assert torch.equal(apart.ids[is_chat], documents.ids[is_chat])
    assert abs(of_chats - 200) <= 1


def test_a_run_goes_on_at_the_same_rows(tmp_path: Path) -> None:
    manifest = build_rows(tmp_path / "rows", made_up(200, vocab_size=V, longest=T), T, vocab_size=V)
    whole = TokenLoader(manifest, seq_length=T, global_batch=4, micro_batch=2, seed=9)
    expected = [torch.cat(whole.next_batch()) for _ in range(9)]
    first = TokenLoader(manifest, seq_length=T, global_batch=4, micro_batch=4, seed=9)
    for _ in range(4):
        first.next_batch()
    again = TokenLoader(manifest, seq_length=T, global_batch=4, micro_batch=1, seed=9, rank=1, world_size=2)
    again.load_state(first.state())
    for k in range(4, 9):
        assert torch.equal(torch.cat(again.next_batch()), expected[k][2:])


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-014")
def test_rows_of_another_length_are_refused(tmp_path: Path) -> None:
    manifest = build_rows(tmp_path / "rows", made_up(90, vocab_size=V, longest=T), T, vocab_size=V)
    for length in (T - 1, T // 2, T + 8):
        with pytest.raises(DataError, match="would cut"):
            TokenLoader(manifest, seq_length=length, global_batch=1, micro_batch=1, seed=0)
        with pytest.raises(DataError, match="would cut"):
            EvaluationLoader(manifest, seq_length=length, micro_batch=1)
    twice = TokenLoader(manifest, seq_length=2 * T, global_batch=1, micro_batch=1, seed=0)
    assert int(twice.documents(0)[0].cu_seqlens.diff().max()) <= T


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-014")
def test_a_reader_that_knows_no_flags_refuses_them_by_the_version(tmp_path: Path) -> None:
    manifest = build_rows(tmp_path / "rows", made_up(20, vocab_size=V, longest=T), T, vocab_size=V)
    path = manifest.folder / "manifest.json"
    recorded = json.loads(path.read_text())
    assert recorded["schema"] == "apr-dist-shards-v2"
    without = {key: value for key, value in recorded.items() if key != "conversations"}
    for broken in (
        recorded | {"schema": "apr-dist-shards-v1"},
        without,
        recorded | {"vocab_size": 2**30 + 1},
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(ManifestError):
            Manifest.load(manifest.folder)
    path.write_text(json.dumps(recorded | {"schema": "apr-dist-shards-v3"}))
    with pytest.raises(ManifestError, match="apr-dist-shards-v3"):
        Manifest.load(manifest.folder)


def test_plain_shards_keep_their_version(tmp_path: Path) -> None:
    plain = build_shards_of(tmp_path / "plain", [np.arange(99, dtype=np.uint32)])
    recorded = json.loads((plain.folder / "manifest.json").read_text())
    assert recorded["schema"] == "apr-dist-shards-v1"
    assert "targets" not in recorded["shards"][0]
    assert not plain.flagged


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-014")
@pytest.mark.parametrize(
    ("bit", "where", "complaint"),
    [
        (30, 0, "rows do not begin"),
        (31, 0, "are targets"),
        (31, 5, "its targets is"),
        (29, 3, "its max_id is"),
    ],
)
def test_verification_finds_a_wrong_flag(tmp_path: Path, bit: int, where: int, complaint: str) -> None:
    manifest = build_rows(tmp_path / "rows", made_up(20, vocab_size=V, longest=T), T, vocab_size=V)
    (shard,) = manifest.shards
    words = np.fromfile(manifest.path_of(shard), dtype="<u4")
    words[where] ^= np.uint32(1 << bit)
    words.tofile(manifest.path_of(shard))
    found = verify_dataset(manifest.folder)
    assert any(complaint in str(problem) for problem in found.problems)


def test_ids_beyond_the_vocabulary_are_found_under_the_flags(tmp_path: Path) -> None:
    manifest = build_rows(tmp_path / "rows", made_up(20, vocab_size=V, longest=T), T, vocab_size=V)
    replace(manifest, vocab_size=100).write()
    assert any("it holds the id" in str(one) for one in verify_dataset(manifest.folder).problems)


def test_a_manifest_is_repaired_and_a_lost_one_is_not_guessed(tmp_path: Path) -> None:
    manifest = build_rows(
        tmp_path / "rows", made_up(200, vocab_size=V, longest=T), T, vocab_size=V, shard_tokens=900
    )
    path = manifest.folder / "manifest.json"
    recorded = json.loads(path.read_text())
    recorded["shards"][0]["targets"] += 1
    path.write_text(json.dumps(recorded))
    repaired = repair_manifest(manifest.folder).manifest
    assert repaired.shards == manifest.shards
    assert repaired.conversations == manifest.conversations
    assert Manifest.load(manifest.folder).fingerprint == manifest.fingerprint
    path.unlink()
    with pytest.raises(ShardError, match="flags of conversations"):
        repair_manifest(manifest.folder)
