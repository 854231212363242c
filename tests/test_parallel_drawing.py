"""Weights from scratch are drawn on threads, and are those that one thread draws."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from builders.models import tiny_config

from apr_dist.model.transformer import initial_weight
from apr_dist.parallel import weights

CONFIG = tiny_config()
SHAPES = CONFIG.parameter_shapes()


@pytest.fixture
def _four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_four_threads")
def test_weights_drawn_ahead_have_the_bits_of_those_drawn_one_by_one() -> None:
    drawn = dict(zip(SHAPES, weights._drawn_ahead(SHAPES, CONFIG, 3), strict=True))
    for name, shape in SHAPES.items():
        assert torch.equal(drawn[name], initial_weight(name, shape, config=CONFIG, seed=3)), name


@pytest.mark.usefixtures("_four_threads")
def test_no_more_is_drawn_ahead_than_the_largest_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    def counted(name: str, shape: tuple[int, ...], **options: object) -> torch.Tensor:
        begun.append(math.prod(shape))
        return initial_weight(name, shape, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(weights, "initial_weight", counted)
    largest, given, ahead = max(map(math.prod, SHAPES.values())), 0, []
    for tensor in weights._drawn_ahead(SHAPES, CONFIG, 3):
        given += tensor.numel()
        ahead.append(sum(begun) - given)
    assert max(ahead) <= largest
    assert max(ahead) > 0  # several were


def test_what_a_draw_raises_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> torch.Tensor:
        raise MemoryError("no room")

    monkeypatch.setattr(weights, "initial_weight", broken)
    with pytest.raises(MemoryError, match="no room"):
        next(weights._drawn_ahead(SHAPES, CONFIG, 3))
