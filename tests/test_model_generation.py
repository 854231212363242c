"""Generation with a KV cache says what the whole network says, and samples as it was told."""

from __future__ import annotations

import pytest
import torch
from builders.models import tiny_config, tiny_decoder
from builders.reference import reference_model

from apr_dist.errors import UsageError
from apr_dist.model.families import Family
from apr_dist.model.generation import Sampling, choose, generate, stream

PROMPT = [5, 17, 3, 88, 41]


@pytest.mark.shows("generates")
@pytest.mark.parametrize("family", Family)
def test_greedy_text_equals_the_reference_token_by_token(family: Family) -> None:
    config = tiny_config(family, tie_word_embeddings=False, max_position_embeddings=128)
    ours = tiny_decoder(config, seed=4)
    theirs = reference_model(ours)
    expected = theirs.generate(
        torch.tensor([PROMPT]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    found = generate(ours, PROMPT, Sampling(max_new_tokens=40))
    assert found == expected[0, len(PROMPT) :].tolist()
    assert len(set(found)) > 5


@pytest.mark.parametrize("window", [None, 3, 8])
def test_a_cached_step_equals_reading_everything_again(window: int | None) -> None:
    config = tiny_config(Family.MISTRAL, sliding_window=window)
    model = tiny_decoder(config)
    tokens = torch.tensor([[*PROMPT, 9, 60, 2, 33, 71, 8]])
    whole = model(tokens)
    caches = model.empty_caches(16)
    steps = [model(tokens[:, :4], caches=caches), model(tokens[:, 4:7], caches=caches)]
    steps += [model(tokens[:, i : i + 1], caches=caches) for i in range(7, 11)]
    assert torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-5)


def test_it_stops_after_a_stop_token_and_hands_it_out() -> None:
    model = tiny_decoder()
    free = generate(model, PROMPT, Sampling(max_new_tokens=12))
    stop = free[4]
    assert (
        generate(model, PROMPT, Sampling(max_new_tokens=12, stop_ids=frozenset({stop})))
        == (free[: free.index(stop) + 1])
    )


def test_a_seed_decides_the_draw() -> None:
    model = tiny_decoder()
    draws = [
        generate(model, PROMPT, Sampling(max_new_tokens=20, temperature=3.0, seed=seed)) for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_tokens_come_one_at_a_time() -> None:
    tokens = stream(tiny_decoder(), PROMPT, Sampling(max_new_tokens=3))
    assert [next(tokens) for _ in range(3)] == generate(tiny_decoder(), PROMPT, Sampling(max_new_tokens=3))
    with pytest.raises(StopIteration):
        next(tokens)


LOGITS = torch.tensor([0.1, 0.5, 0.25, 0.15]).log()


def drawn(sampling: Sampling) -> dict[int, float]:
    generator = torch.Generator().manual_seed(0)
    draws = [choose(LOGITS.clone(), sampling, generator) for _ in range(4000)]
    return {token: draws.count(token) / len(draws) for token in sorted(set(draws))}


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), {0: 0.1, 1: 0.5, 2: 0.25, 3: 0.15}),
        (Sampling(temperature=1.0, top_k=2), {1: 2 / 3, 2: 1 / 3}),
        (Sampling(temperature=1.0, top_p=0.6), {1: 2 / 3, 2: 1 / 3}),
        (Sampling(temperature=1.0, top_p=0.01), {1: 1.0}),
        (Sampling(temperature=0.5, top_k=2), {1: 0.8, 2: 0.2}),
        (Sampling(temperature=0.0), {1: 1.0}),
    ],
    ids=["plain", "top-k", "top-p", "tiny top-p", "cool", "greedy"],
)
def test_draws_follow_the_distribution_asked_for(sampling: Sampling, expected: dict[int, float]) -> None:
    assert drawn(sampling) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_new_tokens", 0), ("temperature", -1.0), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.5)],
)
def test_a_value_outside_its_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{field} is {value}"):
        Sampling(**{field: value})  # type: ignore[arg-type]


def test_an_impossible_prompt_is_refused() -> None:
    model = tiny_decoder()
    with pytest.raises(UsageError, match="prompt is empty"):
        generate(model, [])
    with pytest.raises(UsageError, match=r"holds token 97.*0 to 96"):
        generate(model, [1, 97])
    with pytest.raises(UsageError, match=r"60 prompt tokens and 10 new ones.*at most 64"):
        generate(model, [1] * 60, Sampling(max_new_tokens=10))
