"""On every set of kernels a module's ``forward`` is called: hooks see it, and what wraps a module counts."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from builders.kernels import CASES, KernelCase
from builders.models import random_tokens, tiny_config, tiny_decoder
from torch import nn

from apr_dist.choices import ActivationCheckpointing, KernelChoice
from apr_dist.model.families import Family
from apr_dist.model.kernels.choice import SETS, available
from apr_dist.model.layers import GatedMLP, Head, Linear, RMSNorm
from apr_dist.model.transformer import Decoder

FAMILIES = pytest.mark.parametrize("family", [Family.LLAMA, Family.QWEN2, Family.QWEN3])
TIES = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


class Adapted(nn.Module):
    """A linear map and a low-rank one beside it, as LoRA (arXiv:2106.09685) wraps it; the first is frozen."""

    def __init__(self, base: Linear, *, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        draw, place = torch.Generator().manual_seed(5), base.weight.device
        self.down = nn.Parameter(torch.randn(rank, base.in_features, generator=draw).mul_(0.1).to(place))
        self.up = nn.Parameter(torch.randn(base.out_features, rank, generator=draw).mul_(0.1).to(place))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T  # type: ignore[no-any-return]


def adapt(model: Decoder) -> None:
    """Wrap every linear map, the head among them."""
    maps = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    for name in maps:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Adapted(model.get_submodule(name)))  # type: ignore[arg-type]


def merged(model: Decoder) -> Decoder:
    """The plain decoder that an adapted one is equal to."""
    weights = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            weight = weights.pop(f"{name}.base.weight")
            weights[f"{name}.weight"] = weight + weights.pop(f"{name}.up") @ weights.pop(f"{name}.down")
            if module.base.bias is not None:
                weights[f"{name}.bias"] = weights.pop(f"{name}.base.bias")
    plain = tiny_decoder(model.config).to(next(model.parameters()).device)
    plain.load_state_dict(weights)
    return plain


@FAMILIES
@TIES
@pytest.mark.parametrize("mode", ActivationCheckpointing)
def test_a_hook_on_any_module_is_called_in_training_and_in_evaluation(
    family: Family, tied: bool, mode: ActivationCheckpointing, kernels: KernelCase
) -> None:
    model = kernels.put(tiny_decoder(tiny_config(family, tie_word_embeddings=tied)))
    model.set_checkpointing(mode)
    tokens = random_tokens(model.config, (2, 9)).to(kernels.device)
    watched = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding | RMSNorm | GatedMLP)
    }
    assert sum(isinstance(module, nn.Linear) for module in watched.values()) == 7 * 2 + (not tied)
    called: Counter[str] = Counter()
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: called.update([name]))
    total, _ = model(tokens[:, :-1], tokens[:, 1:])
    assert called == dict.fromkeys(watched, 1)
    total.backward()
    called.clear()
    model.eval()
    with torch.no_grad():
        for targets in (None, tokens[:, 1:]):
            model(tokens[:, :-1], targets)
            assert called == dict.fromkeys(watched, 1)
            called.clear()


def test_a_backward_hook_on_any_linear_map_sees_its_gradients(kernels: KernelCase) -> None:
    model = kernels.put(tiny_decoder(tiny_config(tie_word_embeddings=True)))
    tokens = random_tokens(model.config, (2, 9)).to(kernels.device)
    seen: dict[str, torch.Size] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_full_backward_hook(
                lambda _module, _inputs, outputs, name=name: seen.update({name: outputs[0].shape})
            )
    model(tokens[:, :-1], tokens[:, 1:])[0].backward()
    assert len(seen) == 7 * 2
    assert seen["model.layers.0.mlp.gate_proj"] == (2, 8, 48)


@FAMILIES
@TIES
def test_wrapped_linear_maps_compute_what_their_merged_weights_do(
    family: Family, tied: bool, kernels: KernelCase
) -> None:
    model = kernels.put(tiny_decoder(tiny_config(family, tie_word_embeddings=tied)))
    tokens = random_tokens(model.config, (2, 9)).to(kernels.device)
    before = model(tokens)
    adapt(model)
    plain = merged(model)
    with torch.no_grad():
        assert not torch.allclose(model(tokens), before, atol=1e-2)
        assert torch.allclose(model(tokens), plain(tokens), atol=1e-4)
    total, count = model(tokens[:, :-1], tokens[:, 1:])
    expected, same = plain(tokens[:, :-1], tokens[:, 1:])
    assert count == same
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    total.backward()
    expected.backward()
    wanted = {name: weight.grad for name, weight in plain.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            assert module.base.weight.grad is None
            gradient = wanted[f"{name}.weight"]
            assert gradient is not None
            for found, exact in (
                (module.up.grad, gradient @ module.down.T),
                (module.down.grad, module.up.T @ gradient),
            ):
                assert found is not None
                assert (found - exact).abs().max() < 1e-4 * exact.abs().max()


def test_a_wrapped_head_has_z_loss_too(kernels: KernelCase) -> None:
    model = kernels.put(tiny_decoder(tiny_config(tie_word_embeddings=False)))
    model.z_loss = 0.1
    tokens = random_tokens(model.config, (2, 9)).to(kernels.device)
    expected = model(tokens[:, :-1], tokens[:, 1:])
    wanted = torch.autograd.grad(expected[0], model.model.norm.weight)[0]
    model.lm_head = nn.Sequential(model.lm_head)  # type: ignore[assignment,arg-type]
    assert not isinstance(model.lm_head, Head)
    found = model(tokens[:, :-1], tokens[:, 1:])
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    gradient = torch.autograd.grad(found[0], model.model.norm.weight)[0]
    assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_a_decoder_computes_by_the_set_of_its_device_or_by_the_one_it_was_given() -> None:
    model = tiny_decoder()
    tokens = random_tokens(model.config, (1, 5))
    cpu, plain = SETS[KernelChoice.CPU], SETS[KernelChoice.PLAIN]
    linear = model.model.layers[0].mlp.up_proj
    assert isinstance(linear, Linear)
    assert linear.kernels_for(tokens) is cpu
    model.use_kernels(plain)
    assert linear.kernels_for(tokens) is plain
    model.use_kernels(None)
    assert linear.kernels_for(tokens) is cpu


def test_every_set_that_a_device_has_is_tested() -> None:
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    assert {one for device in devices for one in available(device)} <= set(CASES)
