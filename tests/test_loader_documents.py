"""Document boundaries inside packed rows, and masks over targets."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.shards import build_shards, build_shards_of
from numpy.typing import NDArray

from apr_dist.data.documents import Documents, DocumentStarts, loss_mask
from apr_dist.data.loader import TokenLoader
from apr_dist.data.manifest import Manifest, Shard
from apr_dist.data.shard_files import read_shard_facts
from apr_dist.errors import DataError, ShardError

T, EOS = 8, 7


def loader(manifest: Manifest) -> TokenLoader:
    return TokenLoader(manifest, seq_length=T, global_batch=4, micro_batch=2, seed=0)


def document_numbers(tokens: list[int]) -> list[int]:
    """Number of the document each token belongs to: the end mark is its document's last."""
    numbers, current = [], 0
    for token in tokens:
        numbers.append(current)
        current += token == EOS
    return numbers


@pytest.fixture
def marked(tmp_path: Path) -> Manifest:
    generator = np.random.default_rng(3)
    shards = [generator.integers(0, 12, size, dtype=np.uint32) for size in (400, 333)]
    return build_shards_of(tmp_path, shards, eos_id=EOS)


def with_index(manifest: Manifest) -> Manifest:
    """The same shards with a sidecar of document starts instead of a known end mark."""
    for shard in manifest.shards:
        tokens = np.fromfile(manifest.path_of(shard), dtype="<u4")
        starts = np.concatenate([[0], np.flatnonzero(tokens[:-1] == EOS) + 1]).astype("<u8")
        starts.tofile(manifest.path_of(shard).with_suffix(".idx"))
    shards = tuple(read_shard_facts(manifest.folder, shard.file) for shard in manifest.shards)
    return replace(manifest, shards=shards, has_index=True, eos_token_id=None)


def test_documents_are_told_apart_by_their_end_mark(marked: Manifest) -> None:
    one = loader(marked)
    for micro, documents in zip(one.batch(3), one.documents(3), strict=True):
        inputs = micro[:, :-1]
        assert documents.ids.tolist() == [document_numbers(row) for row in inputs.tolist()]
        assert documents.ids.dtype == documents.positions.dtype == documents.cu_seqlens.dtype == torch.int32


def test_the_index_and_the_end_mark_give_the_same_documents(marked: Manifest) -> None:
    by_mark = loader(marked)
    by_index = loader(with_index(marked))
    for k in range(20):
        for first, second in zip(by_mark.documents(k), by_index.documents(k), strict=True):
            assert torch.equal(first.ids, second.ids)
            assert torch.equal(first.positions, second.positions)
            assert torch.equal(first.cu_seqlens, second.cu_seqlens)


def test_boundaries_positions_and_lengths_agree(marked: Manifest) -> None:
    for documents in loader(marked).documents(0):
        starts = documents.cu_seqlens.tolist()
        assert starts[0] == 0
        assert starts[-1] == documents.ids.numel()
        lengths = [end - begin for begin, end in itertools.pairwise(starts)]
        assert documents.positions.flatten().tolist() == [n for length in lengths for n in range(length)]
        assert documents.max_seqlen == max(lengths)
        assert set(range(0, documents.ids.numel(), T)) <= set(starts)


def test_attention_stays_within_a_document_and_the_past() -> None:
    begins = torch.tensor([[True, False, False, True, False]])
    mask = Documents.from_begins(begins).attention_mask()
    assert mask.shape == (1, 1, 5, 5)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_data_without_boundaries_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither document starts nor an end-of-document id"):
        loader(build_shards(tmp_path, [400])).documents(0)


def test_named_ids_do_not_count_in_the_loss() -> None:
    targets = torch.tensor([[1, 0, 5], [0, 0, 2]], dtype=torch.int32)
    assert loss_mask(targets, ignored_ids=[0, 5]).tolist() == [[True, False, False], [False, False, True]]
    assert loss_mask(targets, ignored_ids=[]).all()


@pytest.mark.parametrize("seed", range(6))
def test_documents_follow_from_where_they_begin(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(5, 40, generator=generator) < (0.0, 0.02, 0.1, 0.5, 0.9, 1.0)[seed]
    found = Documents.from_begins(begins)
    starts = []
    for row in range(5):
        number, place = -1, 0
        for column in range(40):
            if begins[row, column] or column == 0:
                number, place = number + 1, 0
                starts.append(row * 40 + column)
            assert (found.ids[row, column], found.positions[row, column]) == (number, place)
            place += 1
    assert found.cu_seqlens.tolist() == [*starts, 200]
    assert found.max_seqlen == max(b - a for a, b in zip(starts, [*starts[1:], 200], strict=True))
    assert found.cu_seqlens.dtype == found.ids.dtype == found.positions.dtype == torch.int32


def test_an_index_is_read_once_and_refused_when_it_changed(
    marked: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked, read = with_index(marked), list[str]()
    starts = Manifest.document_starts

    def counted(manifest: Manifest, shard: Shard) -> NDArray[np.uint64]:
        read.append(shard.file)
        return starts(manifest, shard)

    monkeypatch.setattr(Manifest, "document_starts", counted)
    one = loader(marked)
    for k in range(30):
        one.documents(k)
    assert sorted(read) == sorted(set(read))
    few = DocumentStarts(max_bytes=1)
    for shard in (*marked.shards, *marked.shards):
        assert few.of(marked, shard).tolist() == starts(marked, shard).tolist()
    path = marked.path_of(marked.shards[0]).with_suffix(".idx")
    content = bytearray(path.read_bytes())
    content[8] ^= 1
    path.write_bytes(content)
    changed = loader(marked)
    with pytest.raises(ShardError, match=r"\.idx: the document index is not as it was recorded"):
        list(map(changed.documents, range(30)))


def swapped(indexes: list[Path]) -> None:
    contents = [path.read_bytes() for path in indexes]
    for path, content in zip(indexes, reversed(contents), strict=True):
        path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda indexes: indexes[0].write_bytes(indexes[0].read_bytes()[:-8]),
        lambda indexes: indexes[0].write_bytes(indexes[0].read_bytes()[:-3]),
        lambda indexes: indexes[0].write_bytes(indexes[0].read_bytes() + b"\0" * 8),
        lambda indexes: indexes[0].write_bytes(b""),
        lambda indexes: indexes[0].unlink(),
        swapped,
    ],
    ids=["cut", "torn", "longer", "empty", "gone", "of other shards"],
)
def test_an_index_that_is_not_the_recorded_one_is_refused(
    marked: Manifest, spoil: Callable[[list[Path]], object]
) -> None:
    indexed = with_index(marked)
    reader = loader(indexed)
    spoil([indexed.path_of(shard).with_suffix(".idx") for shard in indexed.shards])
    with pytest.raises(DataError, match=r"\.idx"):
        list(map(reader.documents, range(30)))
