"""Mixtures: fixed shares of several data sets, reproducible and resumable like one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from builders.shards import build_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_dist.data.loader import Mixture, Source, TokenLoader
from apr_dist.errors import DataError, StreamExhausted, UsageError

T, BATCH = 4, 6
WEIGHTS = {"code": 0.5, "prose": 0.3, "maths": 0.2001}
TOKENS = {"code": [100, 61], "prose": [81], "maths": [41]}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    folder = tmp_path_factory.mktemp("mixture")
    return Mixture(
        tuple(
            Source(name, build_shards(folder / name, TOKENS[name], source=number), weight)
            for number, (name, weight) in enumerate(WEIGHTS.items(), start=1)
        )
    )


def loader(mixture: Mixture, **options: object) -> TokenLoader:
    defaults = {"seq_length": T, "global_batch": BATCH, "micro_batch": 3, "seed": 1}
    return TokenLoader(mixture, **{**defaults, **options})  # type: ignore[arg-type]


def names_of(batch: torch.Tensor) -> list[str]:
    """Which source each row is from: the builder wrote it into the ids."""
    return [list(WEIGHTS)[int(first) // 100_000_000 - 1] for first in batch[:, 0]]


@pytest.fixture(scope="module")
def dealt(mixture: Mixture) -> list[str]:
    one = loader(mixture)
    return [name for _ in range(1400) for name in names_of(torch.cat(one.next_batch()))]


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-011")
def test_any_thousand_batches_hold_each_share_to_within_one_sequence(dealt: list[str]) -> None:
    total = sum(WEIGHTS.values())
    for first in range(0, 400, 7):
        counts = Counter(dealt[first * BATCH : (first + 1000) * BATCH])
        for name, weight in WEIGHTS.items():
            assert abs(counts[name] - weight / total * 1000 * BATCH) <= 1


def test_shares_are_spread_evenly(dealt: list[str]) -> None:
    for first in range(0, 1000, 20):
        counts = Counter(dealt[first * BATCH : (first + 20) * BATCH])
        assert all(abs(counts[name] - weight * 20 * BATCH) < 3 for name, weight in WEIGHTS.items())


def test_every_source_runs_through_epochs_of_its_own(mixture: Mixture) -> None:
    one = loader(mixture)
    rows = [int(row) for _ in range(200) for micro in one.next_batch() for row in micro[:, 0]]
    for number, (name, counts) in enumerate(TOKENS.items(), start=1):
        own = [row for row in rows if row // 100_000_000 == number]
        length = sum((count - 1) // T for count in counts)
        epochs = [own[at : at + length] for at in range(0, len(own) - length, length)]
        assert all(len(set(epoch)) == length for epoch in epochs)
        assert len(epochs) > 1
        assert epochs[0] != epochs[1]
        assert one.progress()[name].sequences == len(own)
        assert one.progress()[name].epoch == len(own) // length
    assert one.epoch == max(progress.epoch for progress in one.progress().values())


@pytest.mark.parametrize("shuffle", ["sequence", "block"])
def test_a_mixture_is_the_same_for_every_cut_and_after_a_resume(mixture: Mixture, shuffle: str) -> None:
    options = {"shuffle": shuffle, "block_sequences": 3}
    whole = loader(mixture, **options)
    for _ in range(17):
        whole.next_batch()
    state = json.loads(json.dumps(whole.state()))
    ranks = [loader(mixture, rank=rank, world_size=2, **options) for rank in (0, 1)]
    for rank in ranks:
        rank.load_state(state)
    for _ in range(5):
        cut = torch.cat([micro for rank in ranks for micro in rank.next_batch()])
        assert torch.equal(cut, torch.cat(whole.next_batch()))


def test_the_order_of_listing_does_not_matter(mixture: Mixture) -> None:
    turned = Mixture(tuple(reversed(mixture.sources)))
    assert turned.fingerprint == mixture.fingerprint
    assert torch.equal(torch.cat(loader(turned).batch(9)), torch.cat(loader(mixture).batch(9)))


def test_another_weight_is_another_mixture(mixture: Mixture) -> None:
    first = mixture.sources[0]
    other = Mixture((Source(first.name, first.dataset, 9.0), *mixture.sources[1:]))
    with pytest.raises(DataError, match="other data"):
        loader(other).load_state(loader(mixture).state())


def test_no_source_is_read_more_often_than_allowed(mixture: Mixture) -> None:
    one = loader(mixture, max_epochs=2)
    batches = len(list(one))
    sizes = {name: sum((count - 1) // T for count in counts) for name, counts in TOKENS.items()}
    assert all(progress.sequences <= 2 * sizes[name] for name, progress in one.progress().items())
    unlimited = loader(mixture)
    unlimited.load_state({**unlimited.state(), "global_batch": batches + 1})
    assert any(progress.sequences > 2 * sizes[name] for name, progress in unlimited.progress().items())
    with pytest.raises(StreamExhausted, match=f"global batch {batches} "):
        one.next_batch()


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0.1, 1e3), min_size=1, max_size=7),
    cycle=st.integers(1_000_000, 10_000_000),
)
def test_units_are_within_one_of_their_share(weights: list[float], cycle: int) -> None:
    sources = (Source(f"source {n}", Stub(str(n)), weight) for n, weight in enumerate(weights))  # type: ignore[arg-type]
    mixture = Mixture(tuple(sources))
    units = mixture.units_per_cycle(cycle)
    assert sum(units) == cycle
    for source, count in zip(mixture.sources, units, strict=True):
        assert abs(count - source.weight / sum(weights) * cycle) < 1 + 1e-6


class Stub:
    """A data set of which only the identity is looked at."""

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint


def test_impossible_mixtures_are_usage_errors(mixture: Mixture, tmp_path: Path) -> None:
    first, second = mixture.sources[:2]
    with pytest.raises(UsageError, match="without sources"):
        Mixture(())
    with pytest.raises(UsageError, match="name code twice"):
        Mixture((first, Source("code", second.dataset)))
    with pytest.raises(UsageError, match=r"data set .* twice"):
        Mixture((first, Source("again", first.dataset)))
    with pytest.raises(UsageError, match=r"weight 0\.0"):
        Mixture((first, Source("prose", second.dataset, 0.0)))
    with pytest.raises(UsageError, match="no sequence in 1,000 batches"):
        loader(Mixture((first, Source("rare", second.dataset, 1e-9))))
    with pytest.raises(UsageError, match="cannot be read unshuffled"):
        loader(mixture, shuffle="none")
    with pytest.raises(DataError, match="holds 41 tokens"):
        loader(mixture, seq_length=50)
