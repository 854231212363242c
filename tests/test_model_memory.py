"""Checkpointing changes what is kept, compiling changes nothing: same loss, same gradients, no breaks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from builders.kernels import KernelCase
from builders.models import random_tokens, tiny_config, tiny_decoder
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from apr_dist.choices import ActivationCheckpointing, KernelChoice
from apr_dist.model.families import Family
from apr_dist.model.kernels.choice import SETS
from apr_dist.model.kernels.loss import cross_entropy_of
from apr_dist.model.transformer import Decoder

KEEPING_LESS = [ActivationCheckpointing.FULL, ActivationCheckpointing.SELECTIVE]


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def loss_and_gradients(model: Decoder, tokens: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    total, _ = model(tokens[:, :-1], tokens[:, 1:])
    total.backward()
    return [total.detach(), *(parameter.grad.clone() for parameter in model.parameters())]  # type: ignore[union-attr]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], *, within: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= within * other.abs().max()


@pytest.mark.parametrize("mode", KEEPING_LESS)
@pytest.mark.parametrize("family", Family)
def test_checkpointing_changes_no_digit(
    family: Family, mode: ActivationCheckpointing, kernels: KernelCase
) -> None:
    model = kernels.put(tiny_decoder(tiny_config(family)))
    tokens = random_tokens(model.config, (2, 17)).to(kernels.device)
    expected = loss_and_gradients(model, tokens)
    model.set_checkpointing(mode)
    assert_same(loss_and_gradients(model, tokens), expected, within=0.0)


def kept_bytes(model: Decoder, tokens: torch.Tensor) -> int:
    """Live bytes the forward pass adds, loss excluded."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        hidden = model.model(tokens)
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    hidden.sum().backward()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("choice", [KernelChoice.PLAIN, KernelChoice.CPU])
def test_each_mode_keeps_less_than_the_one_before(choice: KernelChoice) -> None:
    model = tiny_decoder(tiny_config(num_layers=4, hidden_size=64, head_dim=16, intermediate_size=192))
    model.use_kernels(SETS[choice])
    tokens = random_tokens(model.config, (2, 64))
    kept: dict[str, int] = {}
    for mode in (
        ActivationCheckpointing.OFF,
        ActivationCheckpointing.SELECTIVE,
        ActivationCheckpointing.FULL,
    ):
        model.set_checkpointing(mode)
        kept_bytes(model, tokens)
        kept[mode] = kept_bytes(model, tokens)
    assert kept[ActivationCheckpointing.FULL] < 0.3 * kept[ActivationCheckpointing.OFF]
    assert (
        kept[ActivationCheckpointing.FULL]
        < kept[ActivationCheckpointing.SELECTIVE]
        < 0.8 * kept[ActivationCheckpointing.OFF]
    )


def peak_bytes(compute: Callable[[], torch.Tensor]) -> int:
    """Largest sum of live bytes that forward and backward add."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        compute().backward()
    live = peak = 0
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def test_the_loss_of_qwens_vocabulary_takes_a_tenth_of_the_plain_ones_memory(kernels: KernelCase) -> None:
    vocab, hidden_size, tokens = 151_936, 16, 1536
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator).requires_grad_()
    head = torch.randn(vocab, hidden_size, generator=generator).mul_(0.02).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=generator)
    peaks = []
    for compute in (
        lambda: kernels.kernels.cross_entropy(hidden, head, targets).total,
        lambda: cross_entropy_of(F.linear(hidden, head), targets).total,
    ):
        hidden.grad = head.grad = None
        peaks.append(peak_bytes(compute) - 4 * (tokens + vocab) * hidden_size)  # the gradients stay
    assert peaks[0] <= 0.1 * peaks[1]
    assert peaks[1] > 4 * tokens * vocab


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("mode", [ActivationCheckpointing.OFF, *KEEPING_LESS])
@pytest.mark.parametrize("family", [Family.QWEN2, Family.QWEN3])
def test_a_block_compiles_to_one_graph_that_is_never_compiled_again(
    family: Family, mode: ActivationCheckpointing
) -> None:
    config = tiny_config(family, num_layers=3)
    plain, compiled = tiny_decoder(config), tiny_decoder(config)
    compiled.set_checkpointing(mode)
    compiled.compile_blocks(backend="aot_eager")
    steps = [random_tokens(config, (2, 17), seed=seed) for seed in range(4)]
    for tokens in steps[:2]:
        assert_same(loss_and_gradients(compiled, tokens), loss_and_gradients(plain, tokens), within=1e-5)
    graphs = counters["stats"]["unique_graphs"]
    for tokens in steps[2:]:
        loss_and_gradients(compiled, tokens)
    assert graphs == counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


FAULTS = """
import resource, torch
from apr_dist.model.host_memory import keep_freed_memory

def steps():  # like a step: many blocks, all freed at its end; page faults of the last four of eight
    faults = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.empty((9 << 20) + 4096 * i).fill_(1.0) for i in range(8)]
        del blocks
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return sum(faults[4:])

given_back = steps()
assert keep_freed_memory()
print(given_back, steps())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc can be told")
def test_memory_that_is_kept_is_not_asked_of_the_kernel_again() -> None:
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    given_back, kept = map(int, run.stdout.split())
    assert kept < given_back / 10
