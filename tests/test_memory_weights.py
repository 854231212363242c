"""Weights stored in fewer bits: split ones are the f32 ones bit for bit, rounded ones are repeatable."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders.models import tiny_config
from builders.runs import metrics, run_here, verdict
from builders.sessions import open_alone
from builders.several import LONG
from builders.several import STEPS as SHORT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apr_dist.apr.reader import AprReader
from apr_dist.choices import Strategy
from apr_dist.errors import ExitCode
from apr_dist.parallel.rounding import key_of, random_words, round_stochastically
from apr_dist.parallel.split_weights import CHUNK, SplitWeight, join, split

if TYPE_CHECKING:
    from builders.runs import Inputs

STEPS = 50


def patterns(first: int, last: int, step: int = 1) -> Tensor:
    """f32 values by their bit patterns."""
    words = torch.arange(first, last, step, dtype=torch.int64)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).view(torch.float32)


def assert_exact(values: Tensor) -> None:
    high, low = (torch.empty(len(values), dtype=kind) for kind in (torch.bfloat16, torch.int16))
    lowered = split(values, high, low)
    assert torch.equal(high.view(torch.int16), values.bfloat16().view(torch.int16)), "what f32 is cast to"
    back, numbers = join(high, low, lowered), ~values.isnan()
    assert torch.equal(back.view(torch.int32)[numbers], values.view(torch.int32)[numbers])
    assert bool(back[~numbers].isnan().all())


@pytest.mark.parametrize("upper", [0, 1, 0x3F80, 0x3F81, 0x7F7F, 0x7F80, 0x8000, 0x8001, 0xBF80, 0xFF7F])
def test_every_lower_half_comes_back(upper: int) -> None:
    assert_exact(patterns(upper << 16, (upper + 1) << 16))


@pytest.mark.parametrize("lower", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x5A5A])
def test_every_sign_exponent_and_upper_half_comes_back(lower: int) -> None:
    assert_exact(patterns(lower, 1 << 32, 1 << 16))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=200))
def test_any_patterns_come_back(words: list[int]) -> None:
    signed = [word - (1 << 32) if word >= 1 << 31 else word for word in words]
    assert_exact(torch.tensor(signed, dtype=torch.int32).view(torch.float32))


def test_a_parameter_is_read_and_written_in_chunks_of_which_single_elements_can_be_read() -> None:
    values = torch.randn(CHUNK + 1000, generator=torch.Generator().manual_seed(1))
    values[::7] = patterns(0x3F808000, 0x3F808001)  # ties that go up and ties that do not
    values[::11] = patterns(0x3F818000, 0x3F818001)
    parameter = torch.nn.Parameter(torch.empty(len(values), dtype=torch.bfloat16), requires_grad=False)
    held = SplitWeight.around(parameter, torch.empty(len(values), dtype=torch.int16))
    held.fill(values)
    copied = held.on_host()
    parameter.zero_()
    assert torch.equal(torch.cat([copied.read(0), copied.read(1)]), values)
    places = torch.arange(0, len(values), 97)
    assert torch.equal(copied.at(places), values[places])


def test_rounding_at_random_is_a_function_of_seed_step_tensor_and_element() -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(2))
    key = key_of(42, 7, "model.norm.weight")
    whole = round_stochastically(values, key=key, start=100)
    parts = [round_stochastically(values[a : a + 1250], key=key, start=100 + a) for a in range(0, 5000, 1250)]
    assert torch.equal(torch.cat(parts), whole), "however it is split over ranks"
    others = [key_of(43, 7, "model.norm.weight"), key_of(42, 8, "model.norm.weight"), key_of(42, 7, "other")]
    for other in others:
        assert not torch.equal(round_stochastically(values, key=other, start=100), whole)
    down = (values.view(torch.int32) & -0x10000).view(torch.float32)
    up = ((values.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    assert bool(((whole.float() == down) | (whole.float() == up)).all())


def test_rounding_at_random_keeps_the_mean_and_what_bf16_can_say() -> None:
    third = torch.full((1 << 20,), 1 + 1 / 512)  # a quarter of a unit in the last place above 1
    rounded = round_stochastically(third, key=key_of(1, 1, "w"), start=0).float()
    assert set(rounded.unique().tolist()) == {1.0, 1 + 1 / 128}
    assert float((rounded > 1).float().mean()) == pytest.approx(0.25, abs=0.002)  # 5 standard errors
    exact = torch.tensor([0.0, -0.0, 1.5, float("inf"), -float("inf"), float("nan")])
    kept = round_stochastically(exact, key=3, start=0)
    assert torch.equal(kept.view(torch.int16), exact.bfloat16().view(torch.int16))


def test_the_random_words_are_those_of_any_device_and_spread_evenly() -> None:
    words = random_words(0x12345678, (1 << 32) - 2, 1 << 18, torch.device("cpu"))
    assert int(words.min()) >= 0
    assert int(words.max()) < 1 << 32
    counts = torch.bincount(words >> 24, minlength=256).double()
    expected = len(words) / 256
    assert float(((counts - expected) ** 2 / expected).sum()) < 255 + 6 * (2 * 255) ** 0.5


def trained(steps: int = STEPS, **settings: Any) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Losses, norms and final weights of a session in bf16 arithmetic, two micro-batches a step."""
    model = tiny_config(vocab_size=512, hidden_size=64, intermediate_size=128, **settings.pop("model", {}))
    random = torch.Generator().manual_seed(1)
    batches = [torch.randint(512, (4, 33), generator=random) for _ in range(steps)]
    parallel = {"precision": "bf16", "offload": settings.pop("offload", "none")}
    sizes = {"batch_size": 4, "micro_batch_size": 2, "seq_length": 32, "num_steps": steps, "lr": 3e-3}
    with open_alone(
        model, Strategy.SINGLE, parallel=parallel, batches=batches, **sizes, **settings
    ) as session:
        found = []
        for step in range(steps):
            session.stepper.take(step, compare=False, more=False)
            taken = session.stepper.read()[0]
            found.append((taken.train_loss, taken.grad_norm))
        return found, {name: session.weight(name) for name, _ in session.model.named_parameters()}


def assert_same(one: tuple[Any, dict[str, Tensor]], other: tuple[Any, dict[str, Tensor]]) -> None:
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name, values in one[1].items():
        assert torch.equal(values, other[1][name]), name


EIGHT = {"optimizer": {"state_bits": 8}}
SPLIT, BF16 = {"memory": {"weights": "split"}}, {"memory": {"weights": "bf16", "gradients": "bf16"}}
OFFLOAD = {"offload": "optimizer"}
UNTIED = {"model": {"tie_word_embeddings": False}}
FULL, LEAVING = ({"compute": {"activation_checkpointing": one}} for one in ("full", "full-offload"))

EQUAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "split": ({}, SPLIT),
    "offloaded": ({}, OFFLOAD),
    "split and offloaded": ({}, SPLIT | OFFLOAD),
    "an untied head": (UNTIED, UNTIED | SPLIT | OFFLOAD),
    "moments in 8 bits": (EIGHT, EIGHT | SPLIT | OFFLOAD),
    "rounded at random, offloaded": (BF16, BF16 | OFFLOAD),
    "inputs of blocks": (FULL, LEAVING),
    "all of it": (EIGHT | FULL | BF16, EIGHT | LEAVING | BF16 | OFFLOAD),
}


@pytest.mark.parametrize(("plain", "rung"), EQUAL.values(), ids=EQUAL)
def test_where_a_run_keeps_its_state_changes_no_bit_of_it(
    plain: dict[str, Any], rung: dict[str, Any]
) -> None:
    steps = STEPS if rung is SPLIT else 12
    assert_same(trained(steps, **plain), trained(steps, **rung))


@pytest.mark.parametrize("name", ["ddp-split", "ddp-offload", "fsdp2-split", "fsdp2-split-8bit"])
def test_split_weights_train_as_f32_ones_on_several_ranks(strategies: Path, name: str) -> None:
    plain = {"fsdp2-split-8bit": "fsdp2-8bit"}.get(name, f"{name.partition('-')[0]}-f32")
    runs = [strategies / "2" / f"stored-{one}" for one in (plain, name)]
    losses = [[(line["train_loss"], line["grad_norm"]) for line in metrics(run)] for run in runs]
    assert len(losses[0]) == (STEPS if name in LONG else SHORT)
    assert losses[0] == losses[1]
    digests = {verdict(run)["facts"]["weights_digest"] for run in runs}
    assert len(digests) == 1


@pytest.mark.parametrize("name", ["ddp-offload", "ddp-bf16", "fsdp2-split", "fsdp2-bf16"])
def test_a_resumed_run_is_the_straight_one(strategies: Path, name: str) -> None:
    run = strategies / "2" / f"stored-{name}"
    facts = [verdict(one)["facts"] for one in (run, run.with_name(f"{run.name}-resumed"))]
    assert facts[0]["weights_digest"] == facts[1]["weights_digest"]
    assert facts[0]["optimizer"] == "StoredAdamW"


def test_gradients_in_bf16_are_near_those_in_f32() -> None:
    f32, bf16 = (trained(20, memory={"weights": "split", "gradients": kind}) for kind in ("f32", "bf16"))
    assert f32[0] != bf16[0]
    for (loss, norm), (other, other_norm) in zip(f32[0], bf16[0], strict=True):
        assert other == pytest.approx(loss, rel=1e-3)
        assert other_norm == pytest.approx(norm, rel=5e-2)


def flags(inputs: Inputs, run: Path, *more: str) -> list[str]:
    given = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(run), "--lr", "1e-3"]
    given += ["--num-steps", "4", "--eval-every", "2", "--warmup-steps", "2", "--target-val-loss", "0.1"]
    return [*given, "--checkpoint.keep-last", "9", "--parallel.precision", "bf16", *more]


def weights(run: Path) -> dict[str, bytes]:
    with AprReader(run / "steps" / "000004" / "checkpoint.apr") as reader:
        return {name: bytes(reader.raw(name)) for name in reader.tensors}


STORED: dict[str, tuple[str, ...]] = {
    "f32": (),
    "split": ("--memory.weights", "split"),
    "offloaded": ("--memory.weights", "split", "--parallel.offload", "optimizer"),
    "bf16": ("--memory.weights", "bf16"),
}


@pytest.fixture(scope="module")
def straight(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Run folders of four steps that nothing interrupted, by how the state is stored."""

    @functools.cache
    def made(stored: str) -> Path:
        run = tmp_path_factory.mktemp("straight") / "run"
        assert run_here(*flags(inputs, run, *STORED[stored])) == 0
        return run

    return made


@pytest.mark.parametrize(
    ("before", "after"),
    [("f32", "split"), ("split", "f32"), ("offloaded", "split"), ("f32", "offloaded")],
)
def test_a_run_goes_on_exactly_where_the_rungs_are_exact(
    before: str, after: str, straight: Callable[[str], Path], inputs: Inputs, tmp_path: Path
) -> None:
    run, other = straight(before), tmp_path / "other"
    halfway = ("--resume", str(run / "steps" / "000002"))
    assert run_here(*flags(inputs, other, *STORED[after], *halfway)) == 0
    assert weights(other) == weights(run) == weights(straight("f32"))


def test_a_run_goes_on_in_bf16_only_when_that_is_allowed_and_then_repeatably(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert run_here(*flags(inputs, run, *STORED["split"])) == 0
    halfway = ("--resume", str(run / "steps" / "000002"))
    assert run_here(*flags(inputs, tmp_path / "no", *STORED["bf16"], *halfway)) == ExitCode.USAGE
    assert "memory.weights was f32 and is bf16" in capsys.readouterr().err
    allowed = ("--resume-allow", "memory.weights")
    for name in ("one", "two"):
        assert run_here(*flags(inputs, tmp_path / name, *STORED["bf16"], *halfway, *allowed)) == 0
    assert weights(tmp_path / "one") == weights(tmp_path / "two") != weights(run)
    with AprReader(tmp_path / "one" / "checkpoint.apr") as reader:
        low = reader.float32("model.layers.0.mlp.up_proj.weight").view("uint32") & 0xFFFF
        assert not low.any(), "a bf16 weight is saved as the f32 that it is"
