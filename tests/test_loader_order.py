"""The order of training sequences: complete, reproducible, and the same however it is cut."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path

import pytest
import torch
from builders.shards import build_shards, build_sparse_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_dist.data.loader import EvaluationLoader, Shuffle, TokenLoader
from apr_dist.data.manifest import Manifest
from apr_dist.errors import DataError, StreamExhausted, UsageError

T = 8
COUNTS = (200, 9, 8, 0, 333, 121)  # the second holds one sequence, the third and fourth none
SEQUENCES = sum(max(count - 1, 0) // T for count in COUNTS)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return build_shards(tmp_path_factory.mktemp("order"), COUNTS)


def loader(manifest: Manifest, **options: object) -> TokenLoader:
    defaults = {"seq_length": T, "global_batch": 8, "micro_batch": 2, "seed": 5}
    return TokenLoader(manifest, **{**defaults, **options})  # type: ignore[arg-type]


def global_batch(manifest: Manifest, k: int, *, world_size: int, **options: object) -> torch.Tensor:
    """Global batch ``k`` put together from what every rank got of it."""
    ranks = [loader(manifest, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    return torch.cat([micro for rank in ranks for micro in rank.batch(k)])


def sequences_from(manifest: Manifest, first: int, count: int, **options: object) -> list[int]:
    """First ids of the sequences at stream positions from ``first`` on."""
    one = loader(manifest, global_batch=1, micro_batch=1, **options)
    return [int(one.batch(position)[0][0, 0]) for position in range(first, first + count)]


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-001")
@pytest.mark.parametrize("shuffle", ["sequence", "block"])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_sequence_occurs_exactly_once_an_epoch(manifest: Manifest, shuffle: str, epoch: int) -> None:
    options = {"shuffle": shuffle, "block_sequences": 3}
    per_epoch = loader(manifest, global_batch=1, micro_batch=1, **options).sequences_per_epoch
    firsts = sequences_from(manifest, epoch * per_epoch, per_epoch, **options)
    assert len(set(firsts)) == per_epoch
    if shuffle == "sequence":
        assert per_epoch == SEQUENCES
        assert sorted(firsts) == [
            shard * 1_000_000 + window * T
            for shard, count in enumerate(COUNTS)
            for window in range(max(count - 1, 0) // T)
        ]


def test_a_row_is_a_window_with_one_token_of_overlap(manifest: Manifest) -> None:
    row = loader(manifest).batch(0)[0][0]
    assert row.dtype == torch.int32
    assert row.tolist() == list(range(int(row[0]), int(row[0]) + T + 1))
    assert int(row[0]) % 1_000_000 % T == 0


def test_epochs_have_different_orders(manifest: Manifest) -> None:
    first, second = (sequences_from(manifest, epoch * SEQUENCES, SEQUENCES) for epoch in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-008")
def test_the_next_seed_does_not_begin_with_this_seeds_next_epoch(manifest: Manifest) -> None:
    first, next_epoch = (sequences_from(manifest, at, SEQUENCES, seed=5) for at in (0, SEQUENCES))
    next_seed = sequences_from(manifest, 0, SEQUENCES, seed=6)
    assert first != next_epoch
    assert first != next_seed
    assert next_epoch != next_seed


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-002")
@pytest.mark.parametrize("shuffle", ["sequence", "block"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_a_global_batch_is_the_same_for_every_world_size_and_micro_batch(
    manifest: Manifest, shuffle: str, world_size: int, micro_batch: int
) -> None:
    options = {"global_batch": 16, "shuffle": shuffle, "block_sequences": 4}
    per_epoch = loader(manifest, micro_batch=1, **options).sequences_per_epoch
    for k in (0, 3, per_epoch // 16, per_epoch // 8):  # the last two run over the end of an epoch
        expected = torch.cat(loader(manifest, micro_batch=1, **options).batch(k))
        found = global_batch(manifest, k, world_size=world_size, micro_batch=micro_batch, **options)
        assert torch.equal(found, expected)


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-003")
@pytest.mark.parametrize("shuffle", ["sequence", "block"])
def test_resuming_at_every_point_continues_the_uninterrupted_run(manifest: Manifest, shuffle: str) -> None:
    options = {"shuffle": shuffle, "block_sequences": 4}
    whole = loader(manifest, **options)
    states, batches = [], []
    for _ in range(2 * SEQUENCES // 8 + 2):
        states.append(json.loads(json.dumps(whole.state())))
        batches.append(torch.cat(whole.next_batch()))
    for at, state in enumerate(states):
        # On another number of processes and with another micro-batch.
        ranks = [loader(manifest, micro_batch=1, rank=rank, world_size=2, **options) for rank in (0, 1)]
        for rank in ranks:
            rank.load_state(state)
        resumed = torch.cat([micro for rank in ranks for micro in rank.next_batch()])
        assert torch.equal(resumed, batches[at])
        assert ranks[0].state() == (states[at + 1] if at + 1 < len(states) else whole.state())


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_cut_of_any_order_gives_the_same_global_batches(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    counts = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=4).filter(lambda c: max(c) > 5))
    manifest = build_shards(tmp_path_factory.mktemp("cut"), counts)
    world_size, micro, pieces = (data.draw(st.integers(1, 4)) for _ in range(3))
    size, seed, k = (
        world_size * micro * pieces,
        data.draw(st.integers(0, 2**64 - 1)),
        data.draw(st.integers(0, 9)),
    )
    common = {"seq_length": 5, "global_batch": size, "seed": seed}
    whole = torch.cat(loader(manifest, micro_batch=size, **common).batch(k))
    cut = global_batch(manifest, k, world_size=world_size, micro_batch=micro, **common)
    assert torch.equal(cut, whole)


def test_ranks_share_no_sequence_within_an_epoch(manifest: Manifest) -> None:
    owned = []
    for rank in range(4):
        one = loader(manifest, micro_batch=1, rank=rank, world_size=4)
        owned.append({int(micro[0, 0]) for k in range(SEQUENCES // 8) for micro in one.batch(k)})
    for first, second in itertools.combinations(owned, 2):
        assert not first & second


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-004")
def test_a_state_of_other_data_is_refused_by_name(manifest: Manifest, tmp_path: Path) -> None:
    state = loader(manifest).state()
    other = build_shards(tmp_path, [200, 9, 8, 0, 333, 122])
    with pytest.raises(DataError, match=r"other data: .*Expected") as caught:
        loader(other).load_state(state)
    assert manifest.fingerprint in str(caught.value)
    assert other.fingerprint in str(caught.value)
    assert caught.value.falsifier == "FALSIFY-APR-DIST-LOADER-004"


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("seed", {"seed": 6}),
        ("seq_length", {"seq_length": T + 1}),
        ("batch_size", {"global_batch": 16}),
        ("shuffle", {"shuffle": "block"}),
    ],
)
def test_a_state_of_another_order_is_refused_by_name(
    manifest: Manifest, key: str, options: dict[str, object]
) -> None:
    with pytest.raises(DataError, match=f"another {key}"):
        loader(manifest, **options).load_state(loader(manifest).state())


@pytest.mark.parametrize("change", [{"version": 99}, {"global_batch": -1}, {"global_batch": "7"}])
def test_a_state_that_is_none_is_refused(manifest: Manifest, change: dict[str, object]) -> None:
    one = loader(manifest)
    with pytest.raises(DataError, match="loader state has version"):
        one.load_state({**one.state(), **change})


def test_position_and_epoch_follow_from_the_state(manifest: Manifest) -> None:
    one = loader(manifest)
    one.load_state({**one.state(), "global_batch": 3 * SEQUENCES // 8 + 1})
    assert one.position == (3 * SEQUENCES // 8 + 1) * 8
    assert one.epoch == one.position // SEQUENCES == 3


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-009")
def test_the_stream_ends_by_name_when_the_epochs_allowed_are_used_up(manifest: Manifest) -> None:
    one = loader(manifest, max_epochs=2)
    assert len(list(one)) == 2 * SEQUENCES // 8
    with pytest.raises(StreamExhausted, match="epoch 2"):
        one.next_batch()
    assert one.state()["global_batch"] == 2 * SEQUENCES // 8


def test_without_a_limit_the_data_cycles(manifest: Manifest) -> None:
    assert len(loader(manifest).batch(10**9)) == 4


def test_an_unshuffled_stream_runs_once_in_order(manifest: Manifest) -> None:
    one = loader(manifest, shuffle=Shuffle.NONE, micro_batch=8)
    firsts = [int(first) for micro in one for first in micro[0][:, 0]]
    assert firsts == sorted(firsts)
    assert len(firsts) == SEQUENCES // 8 * 8


def test_the_tokens_that_no_sequence_holds_are_counted(manifest: Manifest) -> None:
    used = sum(windows * T + 1 for count in COUNTS if (windows := max(count - 1, 0) // T))
    assert loader(manifest).dropped_tokens == sum(COUNTS) - used
    assert (
        loader(manifest, shuffle="block", block_sequences=16).dropped_tokens > loader(manifest).dropped_tokens
    )


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-012")
def test_a_shard_beyond_two_to_the_thirty_two_tokens_is_addressed_right(tmp_path: Path) -> None:
    tokens = 2**32 + 4097
    manifest = build_sparse_shards(tmp_path, shards=1, tokens=tokens)
    at = tokens - 17
    with (tmp_path / "shard-00000.bin").open("r+b") as file:
        file.seek(at * 4)
        file.write(b"".join(n.to_bytes(4, "little") for n in range(1, 18)))
    one = TokenLoader(
        manifest, seq_length=16, global_batch=1, micro_batch=1, seed=0, shuffle="none", verify="off"
    )
    last = one.sequences_per_epoch - 1
    assert last * 16 == at > 2**32
    assert one.batch(last)[0][0].tolist() == list(range(1, 18))


def test_a_loader_survives_pickling_with_its_place(manifest: Manifest) -> None:
    one = loader(manifest)
    one.next_batch()
    other = pickle.loads(pickle.dumps(one))
    assert other.state() == one.state()
    assert torch.equal(torch.cat(other.next_batch()), torch.cat(one.next_batch()))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"global_batch": 9}, r"global_batch 9 .*world_size 1 x micro_batch 2"),
        ({"global_batch": 8, "micro_batch": 2, "world_size": 3}, "world_size 3"),
        ({"rank": 1}, "rank 1 of world_size 1"),
        ({"micro_batch": 0}, "micro_batch 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seq_length": 0}, "seq_length 0"),
        ({"shuffle": "random"}, "one of sequence, block, none"),
        ({"verify": "never"}, "first-touch, open, off"),
        ({"max_epochs": 0}, "max_epochs is 0"),
        ({"shuffle": "block", "block_sequences": 3}, "micro_batch 2 does not divide block_sequences 3"),
        ({"max_open_shards": 0}, "max_open_shards 0"),
    ],
)
def test_an_impossible_request_is_a_usage_error(
    manifest: Manifest, options: dict[str, object], text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        loader(manifest, **options)


def test_a_negative_batch_number_is_a_usage_error(manifest: Manifest) -> None:
    with pytest.raises(UsageError, match="global batch -1"):
        loader(manifest).batch(-1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 4, 7])
@pytest.mark.parametrize("sample", [None, 1, 30, 10_000])
def test_ranks_evaluate_the_same_sequences_completely_and_disjointly(
    manifest: Manifest, world_size: int, micro_batch: int, sample: int | None
) -> None:
    ranks = [
        EvaluationLoader(
            manifest,
            seq_length=T,
            micro_batch=micro_batch,
            rank=rank,
            world_size=world_size,
            max_sequences=sample,
        )
        for rank in range(world_size)
    ]
    batches = [list(rank) for rank in ranks]
    assert {len(one) for one in batches} == {len(ranks[0])}
    firsts = [int(first) for one in batches for batch in one for first in batch[:, 0]]
    assert all(batch.shape[0] <= micro_batch and batch.shape[1] == T + 1 for one in batches for batch in one)
    assert len(firsts) == len(set(firsts)) == min(sample or SEQUENCES, SEQUENCES)
    alone = EvaluationLoader(manifest, seq_length=T, micro_batch=5, max_sequences=sample)
    assert sorted(firsts) == sorted(int(first) for batch in alone for first in batch[:, 0])


def test_an_evaluation_names_its_sequences(manifest: Manifest) -> None:
    every = EvaluationLoader(manifest, seq_length=T, micro_batch=4)
    sample = EvaluationLoader(manifest, seq_length=T, micro_batch=4, max_sequences=10)
    assert every.describe().startswith(f"all {SEQUENCES} sequences of {T} tokens from order")
    assert sample.describe().startswith(f"a fixed sample of 10 of {SEQUENCES} sequences")
    assert manifest.fingerprint[:12] in sample.describe()
    assert [batch.tolist() for batch in sample] == [batch.tolist() for batch in sample]
