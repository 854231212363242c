"""Whose failure it was: what a rank knows of it when its own collective breaks off."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from apr_dist.errors import DataError
from apr_dist.parallel import watchdog as watches
from apr_dist.parallel.watchdog import Failure, Watch

GONE = Failure(rank=1, step=3, phase="training", code=9, text="rank 1 is gone")


@pytest.fixture
def _two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)


@pytest.fixture
def watch() -> Iterator[Watch]:
    made = Watch(rank=0)
    yield made
    made.leave()
    made._awakened.close()  # which a watch that was started closes with its selector


@pytest.fixture
def waited(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the watch waited for word of another rank, each time; it hears none."""
    times: list[float] = []
    monkeypatch.setattr(watch, "failure", lambda *, wait_s: times.append(wait_s))
    return times


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-006")
@pytest.mark.usefixtures("_two_ranks")
def test_a_broken_collective_waits_for_word_of_the_rank_that_failed(watch: Watch) -> None:
    threading.Timer(0.3, watch._learn, [GONE]).start()
    assert watch.cause_of(RuntimeError("Connection closed by peer")) == GONE


@pytest.mark.usefixtures("_two_ranks")
def test_it_waits_once_and_for_no_error_of_its_own(watch: Watch, waited: list[float]) -> None:
    for error in (DataError("a shard is damaged"), RuntimeError("closed"), RuntimeError("closed")):
        assert watch.cause_of(error) is None
    assert waited == [0.0, watches.ANOTHER_RANK_S, 0.0]


def test_one_rank_alone_waits_for_nobody(watch: Watch, waited: list[float]) -> None:
    assert watch.cause_of(RuntimeError("out of memory")) is None
    assert waited == [0.0]
