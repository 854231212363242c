"""A weight that is both embedding and head gets one gradient: the sum autograd would make, made once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from builders.kernels import KernelCase
from builders.models import random_tokens, tiny_config, tiny_decoder
from torch.autograd.graph import Node

from apr_dist.choices import ActivationCheckpointing, KernelChoice
from apr_dist.model.kernels.choice import SETS
from apr_dist.model.transformer import Decoder

Loss = Callable[[Decoder, torch.Tensor, torch.Tensor], torch.Tensor]


def one_gradient(model: Decoder, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return model(inputs, targets)[0]  # type: ignore[no-any-return]


def added_by_autograd(model: Decoder, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The same loss from parts that know nothing of each other."""
    hidden = model.model(inputs)
    return model.kernels_for(hidden).cross_entropy(hidden, model.head_weight, targets).total


def gradients(model: Decoder, loss: Loss, *, seeds: int = 1, ignore: bool = False) -> list[torch.Tensor]:
    model.zero_grad()
    for seed in range(seeds):
        # Of eight ids only, so that each is looked up often.
        tokens = random_tokens(model.config, (3, 17), seed=seed) % 8
        targets = torch.full_like(tokens[:, 1:], -100) if ignore else tokens[:, 1:].contiguous()
        targets[:, ::4] = -100
        (loss(model, tokens[:, :-1], targets) / 3).backward()
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("bf16", [False, True], ids=["f32", "bf16"])
@pytest.mark.parametrize("mode", ActivationCheckpointing)
@pytest.mark.parametrize("seeds", [1, 3])
def test_the_gradient_is_bit_for_bit_what_autograd_adds_up(
    seeds: int, mode: ActivationCheckpointing, bf16: bool
) -> None:
    model = tiny_decoder()
    model.set_checkpointing(mode)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        expected = gradients(model, added_by_autograd, seeds=seeds)
        assert_equal(gradients(model, one_gradient, seeds=seeds), expected)


def test_a_model_held_in_bf16_adds_in_bf16_as_autograd_does() -> None:
    model = tiny_decoder().bfloat16()
    expected = gradients(model, added_by_autograd)
    assert expected[0].dtype is torch.bfloat16
    assert_equal(gradients(model, one_gradient), expected)


def test_targets_that_are_all_ignored_give_a_zero_gradient() -> None:
    found = gradients(tiny_decoder(), one_gradient, ignore=True)
    assert found
    assert all(not gradient.any() for gradient in found)


def test_a_step_makes_no_second_gradient_of_the_embedding_s_size() -> None:
    model = tiny_decoder(tiny_config(vocab_size=512))
    tokens = random_tokens(model.config, (2, 9))
    made: list[tuple[int, ...]] = []

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            known = {one.untyped_storage().data_ptr() for one in args if isinstance(one, torch.Tensor)}
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
                made.append(tuple(out.shape))
            return out

    with Shapes():
        model(tokens[:, :-1], tokens[:, 1:])[0].backward()
    assert made.count(tuple(model.head_weight.shape)) == 2, "its one block, and the sum"


def test_the_weight_is_in_the_graph_once() -> None:
    """So that whoever waits for its gradient (DDP, FSDP2, ZeRO) hears of it once, and of all of it."""
    model = tiny_decoder()
    tokens = random_tokens(model.config, (2, 9))
    total, _ = model(tokens[:, :-1], tokens[:, 1:])
    weight = model.model.embed_tokens.weight
    seen: set[Node] = set()
    waiting, uses = [total.grad_fn], 0
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        following = [after for after, _ in node.next_functions]
        uses += sum(getattr(after, "variable", None) is weight for after in following)
        waiting += following
    assert uses == 1


def test_without_gradients_or_with_a_frozen_embedding_the_loss_is_the_same() -> None:
    model = tiny_decoder()
    tokens = random_tokens(model.config, (2, 9))
    trained, _ = model(tokens[:, :-1], tokens[:, 1:])
    with torch.no_grad():
        evaluated, _ = model(tokens[:, :-1], tokens[:, 1:])
    assert evaluated.item() == pytest.approx(trained.item(), rel=1e-6)
    whole = gradients(model, one_gradient)
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.embed_tokens.weight.grad = None
    assert_equal(gradients(model, one_gradient), whole[1:])


def test_a_gradient_that_nobody_came_for_is_not_added_to_the_next() -> None:
    model = tiny_decoder()
    tokens = random_tokens(model.config, (2, 9))
    total, _ = model(tokens[:, :-1], tokens[:, 1:])
    torch.autograd.grad(total, model.model.norm.weight)
    expected = gradients(model, added_by_autograd)
    assert_equal(gradients(model, one_gradient), expected)


def test_a_second_backward_is_still_refused() -> None:
    model = tiny_decoder()
    tokens = random_tokens(model.config, (2, 9))
    total, _ = model(tokens[:, :-1], tokens[:, 1:])
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already handed on"):
        total.backward()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_set_of_kernels_gives_the_gradient_of_the_textbook(tied: bool, kernels: KernelCase) -> None:
    model = kernels.put(tiny_decoder(tiny_config(tie_word_embeddings=tied)))

    def here(model: Decoder, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return one_gradient(model, inputs.to(kernels.device), targets.to(kernels.device))

    def textbook(model: Decoder, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(inputs.to(kernels.device)).flatten(0, 1)
        return F.cross_entropy(logits, targets.to(kernels.device).flatten(), reduction="sum")

    for one, other in zip(gradients(model, here), gradients(model, textbook), strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_a_device_that_is_not_waited_for_adds_the_same_rows() -> None:
    """As ``plain`` does it, of which CUDA's is one; in other order than autograd."""
    model = tiny_decoder()
    model.use_kernels(SETS[KernelChoice.PLAIN])
    found, expected = gradients(model, one_gradient), gradients(model, added_by_autograd)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_of_a_bf16_embedding_are_added_up_in_f32_where_its_gradient_is_f32(tied: bool) -> None:
    """A token that occurs often: its small gradients would be lost one by one in bf16."""
    model = tiny_decoder(tiny_config(tie_word_embeddings=tied))
    weight = model.model.embed_tokens.weight
    weight.data = weight.data.bfloat16()
    inputs = random_tokens(model.config, (4, 64)) % 2  # two ids alone
    targets = random_tokens(model.config, (4, 64), seed=1)
    found = []
    for kind in (torch.bfloat16, torch.float32):
        weight.data, weight.grad = weight.data.to(kind), None
        weight.grad_dtype = torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(inputs, targets)[0].backward()
        found.append(weight.grad)
    assert found[0].dtype is torch.float32
    if tied:  # the head's part is given as bf16
        assert float((found[0] - found[1]).abs().max()) < 2**-8 * float(found[1].abs().max())
    else:
        assert_equal([found[0]], [found[1]])
