"""The CPU's own causal attention is attention: values and gradients, in blocks, in both types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from builders.models import random_tokens, tiny_config, tiny_decoder
from torch.profiler import ProfilerActivity, profile

from apr_dist.choices import ActivationCheckpointing
from apr_dist.model.kernels import cpu_attention, products
from apr_dist.model.kernels.cpu import CpuKernels
from apr_dist.model.kernels.products import MatmulBackend, cpu_matmul_backend

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def _onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(products.BACKEND_VARIABLE, MatmulBackend.ONEDNN)
    cpu_matmul_backend.cache_clear()
    if cpu_matmul_backend() is not MatmulBackend.ONEDNN:
        pytest.skip("this PyTorch has no oneDNN")
    yield
    cpu_matmul_backend.cache_clear()


def heads(length: int, *, dtype: torch.dtype = torch.float32, query: int = 6, kv: int = 2) -> Heads:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> torch.Tensor:
        return torch.randn(2, length, count, 16, generator=generator).to(dtype).requires_grad_()

    return draw(query), draw(kv), draw(kv)


def exact(tensors: Heads) -> torch.Tensor:
    """By the textbook, in f64."""
    query, key, value = (tensor.double().transpose(1, 2) for tensor in tensors)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT / query.shape[3] ** 0.5
    seen = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.usefixtures("_onednn")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 7, 171, 400, 700, 1030])
def test_values_and_gradients_are_those_of_the_formula(length: int, dtype: torch.dtype) -> None:
    # A key's gradient sums over all queries behind it, so its rounding grows with the sequence.
    within = 1.5e-2 if dtype is torch.bfloat16 else 2e-6 if length <= 400 else 4e-6
    tensors = heads(length, dtype=dtype)
    expected = exact(tensors)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = cpu_attention.causal_attention(*tensors)
    assert found.dtype is dtype
    assert apart(found, expected) < within
    exact_gradients = torch.autograd.grad(expected, tensors, upstream.double())
    gradients = torch.autograd.grad(found, tensors, upstream)
    largest = max(float(gradient.abs().max()) for gradient in exact_gradients)
    for one, other in zip(gradients, exact_gradients, strict=True):
        assert one.dtype is dtype
        assert float((one.double() - other.double()).abs().max()) < within * largest


@pytest.mark.usefixtures("_onednn")
@pytest.mark.parametrize(
    "blocks",
    [
        {"APART_LENGTH": 1, "BLOCK_ROWS": 12},
        {"SPAN": {torch.float32: 4}},
        {"SPAN": {torch.float32: 7}, "SCORES": 1},
    ],
    ids=["heads apart", "heads together", "sequences apart"],
)
def test_blocks_change_nothing_but_rounding(blocks: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = heads(45)
    whole = cpu_attention.causal_attention(*tensors)
    for name, value in blocks.items():
        monkeypatch.setattr(cpu_attention, name, value)
    found = cpu_attention.causal_attention(*tensors)
    upstream = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1))
    assert apart(found, whole) < 1e-6
    pairs = (torch.autograd.grad(one, tensors, upstream) for one in (found, whole))
    for one, other in zip(*pairs, strict=True):
        assert apart(one, other) < 2e-6


@pytest.mark.usefixtures("_onednn")
def test_it_is_chosen_where_sequences_are_long_and_only_for_whole_sequences() -> None:
    long, short = heads(1024), heads(100)
    assert cpu_attention.is_faster(*long[:2])
    assert cpu_attention.is_faster(*(tensor.bfloat16() for tensor in long[:2]))
    assert not cpu_attention.is_faster(*short[:2])
    assert not cpu_attention.is_faster(*(tensor.bfloat16() for tensor in short[:2]))
    assert not cpu_attention.is_faster(long[0][:, -200:], long[1])
    assert not cpu_attention.is_faster(*(tensor.half() for tensor in long[:2]))
    own = CpuKernels().causal()(*long)
    assert torch.equal(own, cpu_attention.causal_attention(*long))
    theirs = F.scaled_dot_product_attention(
        *(tensor.transpose(1, 2) for tensor in long), is_causal=True, enable_gqa=True
    )
    assert apart(own, theirs.transpose(1, 2)) < 2e-6


@pytest.mark.usefixtures("_onednn")
def test_a_window_goes_to_the_kernel_that_has_one() -> None:
    tensors = heads(1024)
    kernels = CpuKernels()
    assert not torch.equal(kernels.causal(10)(*tensors), kernels.causal()(*tensors))


@pytest.mark.usefixtures("_onednn")
def test_f32_products_stay_f32_under_autocast() -> None:
    tensors = heads(200)
    plain = cpu_attention.causal_attention(*tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cpu_attention.causal_attention(*tensors), plain)


@pytest.mark.usefixtures("_onednn")
@pytest.mark.parametrize("mode", [ActivationCheckpointing.FULL, ActivationCheckpointing.SELECTIVE])
def test_checkpointing_changes_no_digit_of_it(
    mode: ActivationCheckpointing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cpu_attention.SPAN, torch.float32, 8)
    monkeypatch.setattr(cpu_attention, "LEAST_LENGTH", 8)
    model = tiny_decoder(tiny_config())
    tokens = random_tokens(model.config, (2, 33))

    def gradients() -> list[torch.Tensor]:
        total, _ = model(tokens[:, :-1], tokens[:, 1:])
        return list(torch.autograd.grad(total, list(model.parameters())))

    expected = gradients()
    model.set_checkpointing(mode)
    for one, other in zip(gradients(), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("_onednn")
@pytest.mark.parametrize(
    ("mode", "again"), [(ActivationCheckpointing.SELECTIVE, False), (ActivationCheckpointing.FULL, True)]
)
def test_selective_checkpointing_keeps_its_result(
    mode: ActivationCheckpointing, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cpu_attention.SPAN, torch.float32, 8)
    monkeypatch.setattr(cpu_attention, "LEAST_LENGTH", 8)
    model = tiny_decoder(tiny_config(num_layers=1))
    model.set_checkpointing(mode)
    tokens = random_tokens(model.config, (1, 33))
    total, _ = model(tokens[:, :-1], tokens[:, 1:])
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        total.backward()
    events = profiler.events()
    assert events is not None
    names = [event.name for event in events]
    backward_only = names.count("aten::_softmax_backward_data")
    assert backward_only > 0
    assert (names.count("aten::_softmax") > backward_only) == again
