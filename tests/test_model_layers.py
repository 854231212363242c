"""On every set of kernels layers compute what the textbook formula and autograd compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from builders.kernels import KernelCase
from builders.models import tiny_config

from apr_dist.choices import KernelChoice
from apr_dist.errors import UsageError
from apr_dist.model.kernels import products
from apr_dist.model.kernels.choice import SETS
from apr_dist.model.kernels.products import MatmulBackend, cpu_matmul_backend
from apr_dist.model.layers import Computed, GatedMLP, Linear, RMSNorm
from apr_dist.model.rotary import RotaryEmbedding, Rotation

CPU = SETS[KernelChoice.CPU]


def gradients(
    compute: Callable[[torch.Tensor], torch.Tensor], module: torch.nn.Module, x: torch.Tensor
) -> list[torch.Tensor]:
    """Output, then the gradient of x and of each parameter, for one fixed upstream gradient."""
    x = x.clone().requires_grad_()
    y = compute(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
    return [y, *torch.autograd.grad(y, (x, *module.parameters()), upstream)]


def agree(
    kernels: KernelCase,
    module: torch.nn.Module,
    formula: Callable[..., torch.Tensor],
    x: torch.Tensor,
    within: float,
) -> None:
    found = [one.cpu() for one in gradients(kernels.put(module), module, x.to(kernels.device))]
    exact = module.cpu().double()
    expected = gradients(lambda z: formula(z, *exact.parameters()), exact, x.double())
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one.double() - other).abs().max() < within * other.abs().max()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(5,), (2, 3), (1,)])
def test_a_linear_map_equals_the_plain_product(
    bias: bool, batch: tuple[int, ...], kernels: KernelCase
) -> None:
    layer = Linear(12, 7, bias=bias)
    agree(kernels, layer, lambda x, w, b=None: F.linear(x, w, b), normal(*batch, 12), 1e-6)


def test_a_linear_map_takes_no_rows(kernels: KernelCase) -> None:
    assert kernels.put(Linear(12, 7))(torch.empty(0, 12, device=kernels.device)).shape == (0, 7)


class Normed(torch.nn.Module):
    """A norm, and the layers that read it."""

    def __init__(self, size: int, *layers: torch.nn.Module) -> None:
        super().__init__()
        self.norm = RMSNorm(size, eps=1e-5)
        self.norm.weight.data = normal(size, seed=1)
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        return torch.cat([layer(normed) for layer in self.layers], -1)


def norm_formula(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def test_the_gated_mlp_of_a_norm_equals_its_formula(kernels: KernelCase) -> None:
    def formula(
        x: torch.Tensor, norm: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
    ) -> torch.Tensor:
        x = norm_formula(x, norm)
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    agree(kernels, Normed(12, GatedMLP(12, 20)), formula, normal(2, 3, 12), 1e-6)


def test_linear_maps_of_a_norm_equal_their_formula(kernels: KernelCase) -> None:
    def formula(
        x: torch.Tensor, norm: torch.Tensor, first: torch.Tensor, bias: torch.Tensor, second: torch.Tensor
    ) -> torch.Tensor:
        x = norm_formula(x, norm)
        return torch.cat((x @ first.T + bias, x @ second.T), -1)

    maps = Normed(12, Linear(12, 7), Linear(12, 5, bias=False))
    agree(kernels, maps, formula, normal(2, 3, 12), 1e-6)


@pytest.mark.parametrize("trained", ["norm.weight", "layers.0.weight", "layers.0.bias", "layers.1.weight"])
def test_a_frozen_neighbour_changes_no_gradient(trained: str, kernels: KernelCase) -> None:
    maps = kernels.put(Normed(12, Linear(12, 7), Linear(12, 5, bias=False)))
    x = normal(2, 3, 12).to(kernels.device)
    maps(x).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in maps.named_parameters()}
    maps.zero_grad()
    for name, parameter in maps.named_parameters():
        parameter.requires_grad_(name == trained)
    maps(x).square().sum().backward()
    for name, parameter in maps.named_parameters():
        before = expected[name]
        assert before is not None
        if name == trained:
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, before)
        else:
            assert parameter.grad is None


class Kept:
    """Elements that the forward pass inside keeps for backward, each memory counted once."""

    def __init__(self) -> None:
        self._found: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self._found[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    def __enter__(self) -> Kept:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    def elements(self) -> int:
        return sum(self._found.values())


def on_the_cpu(module: Normed) -> Normed:
    for part in module.modules():
        if isinstance(part, Computed):
            part.kernels = CPU
    return module


def test_on_the_cpu_only_the_input_of_a_norm_is_kept_for_all_its_maps() -> None:
    maps = on_the_cpu(Normed(12, Linear(12, 7), Linear(12, 5, bias=False)))
    x = normal(64, 12).requires_grad_()
    with Kept() as kept:
        assert maps(x).requires_grad
    weights = sum(p.numel() for p in maps.parameters() if p.ndim == 2 or p.numel() == 12)
    assert kept.elements() == x.numel() + 64 + weights


def test_on_the_cpu_an_mlp_keeps_its_two_factors_and_a_frozen_map_nothing() -> None:
    mlp = on_the_cpu(Normed(12, GatedMLP(12, 20)))
    x, weights = normal(64, 12).requires_grad_(), sum(p.numel() for p in mlp.parameters())
    with Kept() as kept:
        mlp(x)
    assert kept.elements() == x.numel() + 64 + weights + 2 * 64 * 20
    linear = Linear(12, 7, bias=False)
    linear.weight.requires_grad_(False)
    with Kept() as kept:
        assert linear(x).requires_grad
    assert kept.elements() == linear.weight.numel()


def changed(place: str, output: torch.Tensor) -> torch.Tensor:
    if place == "out of place":
        return output * 2
    with torch.no_grad():
        return output.mul_(2)


@pytest.mark.parametrize("place", ["in place", "out of place"])
def test_what_a_hook_makes_of_a_norm_is_what_its_maps_learn_from(place: str, kernels: KernelCase) -> None:
    """A map may keep what a norm is made of, but not if that is no longer what the map read."""
    maps = kernels.put(Normed(12, Linear(12, 7, bias=False)))
    maps.norm.register_forward_hook(lambda _module, _args, output: changed(place, output))
    x = normal(3, 12).to(kernels.device)
    maps(x).sum().backward()
    weight = maps.layers[0].weight
    expected = 2 * norm_formula(x, maps.norm.weight).sum(0).expand_as(weight)
    assert torch.allclose(weight.grad, expected, atol=1e-5)  # type: ignore[arg-type]


def test_a_second_backward_pass_gives_the_same_gradients(kernels: KernelCase) -> None:
    mlp = kernels.put(Normed(12, GatedMLP(12, 20)))
    x = normal(3, 12).to(kernels.device).requires_grad_()
    total = mlp(x).square().sum()
    wanted = [x, *mlp.parameters()]
    first = torch.autograd.grad(total, wanted, retain_graph=True)
    alone = torch.autograd.grad(total, wanted[2], retain_graph=True)[0]
    again = torch.autograd.grad(total, wanted)
    assert torch.equal(alone, first[2])
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("shape", [(4, 16), (2, 3, 2, 16)])
def test_the_norm_equals_its_formula(shape: tuple[int, ...], kernels: KernelCase) -> None:
    layer = RMSNorm(16, eps=1e-5)
    layer.weight.data = normal(16, seed=1)
    agree(kernels, layer, norm_formula, normal(*shape) * 3, 1e-6)


def test_the_norm_of_bf16_is_computed_in_f32(kernels: KernelCase) -> None:
    layer = kernels.put(RMSNorm(16, eps=1e-5))
    x = normal(4, 16).bfloat16().to(kernels.device)
    exact = x.float() * (x.float().pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert layer(x).dtype is torch.bfloat16
    assert torch.equal(layer(x), exact.bfloat16())


def test_the_norm_of_zeros_is_zero_with_finite_gradients(kernels: KernelCase) -> None:
    norm = kernels.put(RMSNorm(16, eps=1e-6))
    found = gradients(norm, norm, torch.zeros(2, 16, device=kernels.device))
    assert found[0].abs().max() == 0
    assert all(torch.isfinite(value).all() for value in found)


def test_rotation_turns_pairs_of_split_halves_and_its_gradient_turns_back(kernels: KernelCase) -> None:
    x = normal(2, 5, 3, 8).to(kernels.device).requires_grad_()
    table = RotaryEmbedding(tiny_config()).to(kernels.device)
    rotation: Rotation = table(torch.arange(5, device=kernels.device).unsqueeze(0))
    turned = kernels.kernels.rotate(x, rotation.cos, rotation.sin)
    pairs = torch.complex(x[..., :4].detach(), x[..., 4:].detach())
    expected = pairs * torch.complex(rotation.cos, rotation.sin)
    assert torch.allclose(turned, torch.cat((expected.real, expected.imag), -1), atol=1e-6)
    (back,) = torch.autograd.grad(turned, x, turned.detach())
    assert torch.allclose(back, x, atol=1e-6)


def test_position_zero_is_not_turned(kernels: KernelCase) -> None:
    x = normal(1, 1, 3, 8).to(kernels.device)
    rotation = RotaryEmbedding(tiny_config()).to(kernels.device)(torch.zeros(1, 1, device=kernels.device))
    assert torch.equal(kernels.kernels.rotate(x, rotation.cos, rotation.sin), x)


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-004")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("ratio", [1, 2, 4, 7, 8])
def test_grouped_queries_equal_full_attention_over_repeated_keys(
    ratio: int, head_dim: int, kernels: KernelCase
) -> None:
    query = normal(2, 19, 2 * ratio, head_dim).to(kernels.device).requires_grad_()
    key = normal(2, 19, 2, head_dim, seed=1).to(kernels.device).requires_grad_()
    value = normal(2, 19, 2, head_dim, seed=2).to(kernels.device).requires_grad_()
    grouped = kernels.kernels.causal()(query, key, value)
    full = dense_attention(query, key.repeat_interleave(ratio, 2), value.repeat_interleave(ratio, 2))
    assert torch.cosine_similarity(grouped.flatten(), full.flatten(), dim=0) >= 0.9999
    assert torch.allclose(grouped, full, atol=1e-5)
    upstream = normal(*full.shape, seed=3).to(kernels.device)
    found = torch.autograd.grad(grouped, (query, key, value), upstream)
    expected = torch.autograd.grad(full, (query, key, value), upstream)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("window", [1, 3, 18, 19, 50])
def test_a_sliding_window_hides_what_is_farther_back(window: int, kernels: KernelCase) -> None:
    query, key, value = (normal(1, 19, 2, 8, seed=seed).to(kernels.device) for seed in range(3))
    expected = dense_attention(query, key, value, window=window)
    made_before = kernels.kernels.attention((1, 19), kernels.device, dtype=torch.float32, window=window)
    for attend in (kernels.kernels.causal(window), made_before):
        assert torch.allclose(attend(query, key, value), expected, atol=1e-5)


def test_a_head_reads_the_kv_head_of_its_group(kernels: KernelCase) -> None:
    query, key = normal(1, 4, 6, 8), normal(1, 4, 2, 8, seed=1)
    value = torch.zeros(1, 4, 2, 8)
    value[:, :, 1] = 1.0
    mixed = kernels.kernels.causal()(*(one.to(kernels.device) for one in (query, key, value))).cpu()
    assert torch.equal(mixed[:, :, :3], torch.zeros(1, 4, 3, 8))
    assert torch.allclose(mixed[:, :, 3:], torch.ones(1, 4, 3, 8))


@pytest.mark.usefixtures("kernels")
def test_products_are_in_full_f32_whatever_the_backend() -> None:
    left, right = normal(64, 256), normal(256, 64, seed=1)
    exact = left.double() @ right.double()
    assert (products.mm(left, right).double() - exact).abs().max() < 1e-6 * 256


def test_a_backend_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(products.BACKEND_VARIABLE, "mkl")
    with pytest.raises(UsageError, match=r"APR_DIST_CPU_MATMUL is 'mkl'.*torch or onednn"):
        cpu_matmul_backend.__wrapped__()


def test_the_backend_never_changes_within_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cpu_matmul_backend()
    other = next(backend for backend in MatmulBackend if backend is not before)
    monkeypatch.setenv(products.BACKEND_VARIABLE, other)
    assert cpu_matmul_backend() is before


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, window: int | None = None
) -> torch.Tensor:
    """Softmax over an explicit mask; heads already equal in number."""
    length = query.shape[1]
    places = torch.arange(length, device=query.device)
    distance = places[:, None] - places[None, :]
    hidden = (distance < 0) | (distance >= (window or length))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)
