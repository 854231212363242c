"""The chunked loss is the loss of the textbook, value and gradients, without the logits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from builders.kernels import KernelCase
from torch.utils._python_dispatch import TorchDispatchMode

from apr_dist.choices import KernelChoice
from apr_dist.model.kernels import cuda
from apr_dist.model.kernels import loss as chunked_loss
from apr_dist.model.kernels.choice import SETS
from apr_dist.model.kernels.loss import Loss, cross_entropy_of

VOCAB, HIDDEN = 301, 24

CrossEntropy = Callable[..., Loss]


@pytest.fixture
def cross_entropy(kernels: KernelCase) -> CrossEntropy:
    """The chunked loss of each set of kernels."""
    if not kernels.kernels.has_own_loss(z_loss=0.0):
        pytest.skip("this set takes Liger's loss")
    return kernels.kernels.cross_entropy


def problem(*, tokens: int = 37, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(VOCAB, HIDDEN, generator=generator).mul_(0.5).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (tokens,), generator=generator)
    targets[::5] = -100
    return hidden, head, targets


def textbook(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, *, z_loss: float = 0.0) -> Loss:
    return cross_entropy_of(F.linear(hidden, head), targets, z_loss=z_loss)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunk", [1, 7, 37, 100])
def test_value_and_gradients_equal_the_plain_loss(
    chunk: int, z_loss: float, cross_entropy: CrossEntropy
) -> None:
    hidden, head, targets = problem()
    exact, _, exact_count = textbook(hidden.double(), head.double(), targets, z_loss=z_loss)
    expected = torch.autograd.grad(exact / 3, (hidden, head))
    total, _, count = cross_entropy(hidden, head, targets, z_loss=z_loss, chunk_tokens=chunk)
    found = torch.autograd.grad(total / 3, (hidden, head))
    assert relative(total, exact) < 1e-6
    assert count == exact_count == 29
    assert total.dtype is torch.float32
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_without_gradients_the_value_has_the_same_bits(
    dtype: torch.dtype, z_loss: float, cross_entropy: CrossEntropy
) -> None:
    hidden, head, targets = problem(dtype=dtype)
    trained = cross_entropy(hidden, head, targets, z_loss=z_loss, chunk_tokens=7)
    with torch.no_grad():
        evaluated = cross_entropy(hidden, head, targets, z_loss=z_loss, chunk_tokens=7)
    for one, other in zip(trained, evaluated, strict=True):
        assert torch.equal(one, other)


def test_many_blocks_of_the_vocabulary_add_up(
    monkeypatch: pytest.MonkeyPatch, cross_entropy: CrossEntropy
) -> None:
    monkeypatch.setattr(chunked_loss, "HEAD_GRADIENT_ROWS", 100)
    hidden, head, targets = problem()
    expected = torch.autograd.grad(textbook(hidden, head, targets)[0], head)[0]
    found = torch.autograd.grad(cross_entropy(hidden, head, targets, chunk_tokens=10)[0], head)[0]
    assert relative(found, expected) < 1e-6


def test_bf16_accumulates_in_f32_and_stays_near_the_f32_loss(cross_entropy: CrossEntropy) -> None:
    hidden, head, targets = problem(dtype=torch.bfloat16)
    exact, *_ = textbook(hidden.double(), head.double(), targets)
    expected = torch.autograd.grad(exact, (hidden, head))
    total, *_ = cross_entropy(hidden, head, targets, chunk_tokens=4)
    found = torch.autograd.grad(total, (hidden, head))
    assert total.dtype is torch.float32
    assert relative(total, exact) < 2e-3
    for one, other in zip(found, expected, strict=True):
        assert one.dtype is torch.bfloat16
        assert relative(one, other) < 2e-2


def test_a_f32_head_gets_the_sum_of_its_chunks_unrounded(cross_entropy: CrossEntropy) -> None:
    hidden, head, targets = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, *_ = cross_entropy(hidden, head, targets, chunk_tokens=4)
    (gradient,) = torch.autograd.grad(total, head)
    assert gradient.dtype is torch.float32
    assert not torch.equal(gradient, gradient.bfloat16().float())


def test_no_tokens_have_no_loss_and_no_gradient(cross_entropy: CrossEntropy) -> None:
    hidden, head, targets = problem(tokens=0)
    total, _, count = cross_entropy(hidden, head, targets)
    d_hidden, d_head = torch.autograd.grad(total, (hidden, head))
    assert (total.item(), count.item(), d_hidden.numel()) == (0.0, 0, 0)
    assert not d_head.any()


def test_autocast_computes_in_its_type_and_returns_gradients_in_the_parameters(
    cross_entropy: CrossEntropy,
) -> None:
    hidden, head, targets = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, *_ = cross_entropy(hidden, head, targets)
    total.backward()
    exact, *_ = cross_entropy(hidden.bfloat16(), head.bfloat16(), targets)
    assert torch.equal(total, exact)
    assert head.grad is not None
    assert head.grad.dtype is torch.float32


def test_without_gradients_the_value_is_the_same_to_the_last_digits(cross_entropy: CrossEntropy) -> None:
    hidden, head, targets = problem()
    total, *_ = cross_entropy(hidden, head, targets)
    with torch.no_grad():
        evaluated, *_ = cross_entropy(hidden, head, targets)
    detached, *_ = cross_entropy(hidden.detach(), head.detach(), targets)
    assert not evaluated.requires_grad
    assert not detached.requires_grad
    assert relative(evaluated, total) < 1e-6
    assert torch.equal(evaluated, detached)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_input_gets_no_gradient_and_the_other_one_the_same(
    frozen: str, cross_entropy: CrossEntropy
) -> None:
    hidden, head, targets = problem()
    whole = torch.autograd.grad(cross_entropy(hidden, head, targets)[0], (hidden, head))
    if frozen == "hidden":
        found = torch.autograd.grad(cross_entropy(hidden.detach(), head, targets)[0], head)[0]
        assert torch.equal(found, whole[1])
    else:
        found = torch.autograd.grad(cross_entropy(hidden, head.detach(), targets)[0], hidden)[0]
        assert torch.equal(found, whole[0])


def test_int32_targets_and_a_batch_dimension_are_taken_as_they_come(cross_entropy: CrossEntropy) -> None:
    hidden, head, targets = problem(tokens=36)
    flat = cross_entropy(hidden, head, targets)
    batched = cross_entropy(hidden.view(4, 9, -1), head, targets.view(4, 9).int())
    assert torch.equal(flat[0], batched[0])
    assert batched[2].dtype is torch.int64


def test_no_target_at_all_is_a_zero_with_zero_gradients(cross_entropy: CrossEntropy) -> None:
    hidden, head, targets = problem()
    total, _, count = cross_entropy(hidden, head, torch.full_like(targets, -100))
    gradients = torch.autograd.grad(total, (hidden, head))
    assert (total.item(), count.item()) == (0.0, 0)
    assert all(gradient.abs().max() == 0 for gradient in gradients)


def test_huge_logits_neither_overflow_nor_lose_the_loss(cross_entropy: CrossEntropy) -> None:
    hidden, head, targets = problem()
    total, *_ = cross_entropy(hidden * 1e4, head, targets)
    exact, *_ = textbook(hidden.double() * 1e4, head.double(), targets)
    assert relative(total, exact) < 1e-6


def test_a_second_backward_is_refused_rather_than_silent(cross_entropy: CrossEntropy) -> None:
    hidden, head, targets = problem()
    total, *_ = cross_entropy(hidden, head, targets)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already handed on"):
        total.backward()


def test_the_largest_temporary_is_one_chunk_of_logits(cross_entropy: CrossEntropy) -> None:
    hidden, head, targets = problem(tokens=64)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Sizes():
        cross_entropy(hidden, head, targets, chunk_tokens=4)[0].backward()
    assert largest == VOCAB * HIDDEN


def test_pytorchs_own_loss_is_the_same(cross_entropy: CrossEntropy) -> None:
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this PyTorch has no linear_cross_entropy")
    hidden, head, targets = problem()
    theirs = F.linear_cross_entropy(hidden, head, targets, reduction="sum", ignore_index=-100)
    total, *_ = cross_entropy(hidden, head, targets)
    assert relative(total, theirs) < 1e-6
    expected = torch.autograd.grad(theirs, (hidden, head))
    for one, other in zip(torch.autograd.grad(total, (hidden, head)), expected, strict=True):
        assert relative(one, other) < 1e-5


LIGER = """
import torch
from apr_dist.model.kernels.cuda import liger_cross_entropy
from apr_dist.model.kernels.plain import Kernels
generator = torch.Generator().manual_seed(0)
hidden = torch.randn(37, 24, generator=generator).requires_grad_()
head = torch.randn(301, 24, generator=generator).requires_grad_()
targets = torch.randint(301, (37,), generator=generator)
targets[::5] = -100
results = []
chunked = Kernels().cross_entropy(hidden, head, targets).total
for total in (chunked, liger_cross_entropy(hidden, head, targets)):
    results.append([total.detach(), *torch.autograd.grad(total, (hidden, head))])
for one, other in zip(*results, strict=True):
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-5), (one, other)
"""


def test_ligers_loss_is_the_same_under_its_interpreter() -> None:
    pytest.importorskip("liger_kernel", reason="the extra liger is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", LIGER], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_liger_is_cudas_loss_except_with_z_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = SETS[KernelChoice.CUDA]
    monkeypatch.setattr(cuda, "find_spec", lambda _: object())
    assert not kernels.has_own_loss(z_loss=0.0)
    assert kernels.describe(z_loss=0.0) == "cuda kernels, loss liger"
    assert kernels.has_own_loss(z_loss=0.1)
    assert kernels.describe(z_loss=0.1) == "cuda kernels, loss chunked"
    monkeypatch.setattr(cuda, "find_spec", lambda _: None)
    assert kernels.has_own_loss(z_loss=0.0)
