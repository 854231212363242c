"""Layers with their own backward compute what the textbook formula and autograd compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from builders.models import tiny_config

from apr_dist.errors import UsageError
from apr_dist.model import matmul
from apr_dist.model.attention import causal_attention
from apr_dist.model.layers import GatedMLP, Linear, RMSNorm, project_normed
from apr_dist.model.matmul import MatmulBackend, cpu_matmul_backend
from apr_dist.model.rotary import RotaryEmbedding, Rotation, rotate


@pytest.fixture(params=list(MatmulBackend))
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(matmul.BACKEND_VARIABLE, request.param)
    cpu_matmul_backend.cache_clear()
    yield
    cpu_matmul_backend.cache_clear()


def gradients(
    compute: Callable[[torch.Tensor], torch.Tensor], module: torch.nn.Module, x: torch.Tensor
) -> list[torch.Tensor]:
    """Output, then the gradient of x and of each parameter, for one fixed upstream gradient."""
    x = x.clone().requires_grad_()
    y = compute(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    return [y, *torch.autograd.grad(y, (x, *module.parameters()), upstream)]


def agree(
    module: torch.nn.Module, formula: Callable[..., torch.Tensor], x: torch.Tensor, within: float
) -> None:
    found = gradients(module, module, x)
    exact = module.double()
    expected = gradients(lambda z: formula(z, *exact.parameters()), exact, x.double())
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one.double() - other).abs().max() < within * other.abs().max()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(5,), (2, 3), (1,)])
def test_a_linear_map_equals_the_plain_product(bias: bool, batch: tuple[int, ...]) -> None:
    layer = Linear(12, 7, bias=bias)
    agree(layer, lambda x, w, b=None: F.linear(x, w, b), normal(*batch, 12), 1e-6)


@pytest.mark.usefixtures("_backend")
def test_a_linear_map_takes_no_rows() -> None:
    assert Linear(12, 7)(torch.empty(0, 12)).shape == (0, 7)


class Normed(torch.nn.Module):
    """A norm, and the layer that reads it."""

    def __init__(self, size: int, *layers: torch.nn.Module) -> None:
        super().__init__()
        self.norm = RMSNorm(size, eps=1e-5)
        self.norm.weight.data = normal(size, seed=1)
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.layers[0], GatedMLP):
            return self.layers[0](x, self.norm)  # type: ignore[no-any-return]
        maps = [layer for layer in self.layers if isinstance(layer, Linear)]
        return torch.cat(project_normed(x, self.norm, maps), -1)


def norm_formula(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


@pytest.mark.usefixtures("_backend")
def test_the_gated_mlp_of_a_norm_equals_its_formula() -> None:
    def formula(
        x: torch.Tensor, norm: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
    ) -> torch.Tensor:
        x = norm_formula(x, norm)
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    agree(Normed(12, GatedMLP(12, 20)), formula, normal(2, 3, 12), 1e-6)


@pytest.mark.usefixtures("_backend")
def test_linear_maps_of_a_norm_equal_their_formula() -> None:
    def formula(
        x: torch.Tensor, norm: torch.Tensor, first: torch.Tensor, bias: torch.Tensor, second: torch.Tensor
    ) -> torch.Tensor:
        x = norm_formula(x, norm)
        return torch.cat((x @ first.T + bias, x @ second.T), -1)

    maps = Normed(12, Linear(12, 7), Linear(12, 5, bias=False))
    agree(maps, formula, normal(2, 3, 12), 1e-6)


@pytest.mark.parametrize("trained", ["norm.weight", "layers.0.weight", "layers.0.bias", "layers.1.weight"])
def test_a_frozen_neighbour_changes_no_gradient(trained: str) -> None:
    maps = Normed(12, Linear(12, 7), Linear(12, 5, bias=False))
    maps(normal(2, 3, 12)).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in maps.named_parameters()}
    maps.zero_grad()
    for name, parameter in maps.named_parameters():
        parameter.requires_grad_(name == trained)
    maps(normal(2, 3, 12)).square().sum().backward()
    for name, parameter in maps.named_parameters():
        before = expected[name]
        assert before is not None
        if name == trained:
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, before)
        else:
            assert parameter.grad is None


def test_of_a_norm_and_its_maps_only_the_input_is_kept() -> None:
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    maps = Normed(12, Linear(12, 7), Linear(12, 5, bias=False))
    x = normal(64, 12).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = project_normed(x, maps.norm, (maps.layers[0], maps.layers[1]))  # type: ignore[arg-type]
    assert out[0].requires_grad
    weights = sum(p.numel() for p in maps.parameters() if p.ndim == 2 or p.numel() == 12)
    assert sum(kept.values()) == x.numel() + 64 + weights


@pytest.mark.parametrize("shape", [(4, 16), (2, 3, 2, 16)])
def test_the_norm_equals_its_formula(shape: tuple[int, ...]) -> None:
    layer = RMSNorm(16, eps=1e-5)
    layer.weight.data = normal(16, seed=1)
    agree(layer, norm_formula, normal(*shape) * 3, 1e-6)


def test_the_norm_of_bf16_is_computed_in_f32() -> None:
    layer = RMSNorm(16, eps=1e-5)
    x = normal(4, 16).bfloat16()
    exact = x.float() * (x.float().pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert layer(x).dtype is torch.bfloat16
    assert torch.equal(layer(x), exact.bfloat16())


def test_the_norm_of_zeros_is_zero_with_finite_gradients() -> None:
    norm = RMSNorm(16, eps=1e-6)
    found = gradients(norm, norm, torch.zeros(2, 16))
    assert found[0].abs().max() == 0
    assert all(torch.isfinite(value).all() for value in found)


def test_rotation_turns_pairs_of_split_halves_and_its_gradient_turns_back() -> None:
    x = normal(2, 5, 3, 8).requires_grad_()
    rotation: Rotation = RotaryEmbedding(tiny_config())(torch.arange(5).unsqueeze(0))
    turned = rotate(x, rotation)
    pairs = torch.complex(x[..., :4].detach(), x[..., 4:].detach())
    expected = pairs * torch.complex(rotation.cos, rotation.sin)
    assert torch.allclose(turned, torch.cat((expected.real, expected.imag), -1), atol=1e-6)
    (back,) = torch.autograd.grad(turned, x, turned.detach())
    assert torch.allclose(back, x, atol=1e-6)


def test_position_zero_is_not_turned() -> None:
    x = normal(1, 1, 3, 8)
    assert torch.equal(rotate(x, RotaryEmbedding(tiny_config())(torch.zeros(1, 1))), x)


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-004")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("ratio", [1, 2, 4, 7, 8])
def test_grouped_queries_equal_full_attention_over_repeated_keys(ratio: int, head_dim: int) -> None:
    query = normal(2, 19, 2 * ratio, head_dim).requires_grad_()
    key = normal(2, 19, 2, head_dim, seed=1).requires_grad_()
    value = normal(2, 19, 2, head_dim, seed=2).requires_grad_()
    grouped = causal_attention(query, key, value)
    full = dense_attention(query, key.repeat_interleave(ratio, 2), value.repeat_interleave(ratio, 2))
    assert torch.cosine_similarity(grouped.flatten(), full.flatten(), dim=0) >= 0.9999
    assert torch.allclose(grouped, full, atol=1e-5)
    upstream = normal(*full.shape, seed=3)
    found = torch.autograd.grad(grouped, (query, key, value), upstream)
    expected = torch.autograd.grad(full, (query, key, value), upstream)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("window", [1, 3, 18, 19, 50])
def test_a_sliding_window_hides_what_is_farther_back(window: int) -> None:
    query, key, value = (normal(1, 19, 2, 8, seed=seed) for seed in range(3))
    found = causal_attention(query, key, value, window=window)
    assert torch.allclose(found, dense_attention(query, key, value, window=window), atol=1e-5)


def test_a_head_reads_the_kv_head_of_its_group() -> None:
    query, key = normal(1, 4, 6, 8), normal(1, 4, 2, 8, seed=1)
    value = torch.zeros(1, 4, 2, 8)
    value[:, :, 1] = 1.0
    mixed = causal_attention(query, key, value)
    assert torch.equal(mixed[:, :, :3], torch.zeros(1, 4, 3, 8))
    assert torch.allclose(mixed[:, :, 3:], torch.ones(1, 4, 3, 8))


@pytest.mark.usefixtures("_backend")
def test_products_are_in_full_f32_whatever_the_backend() -> None:
    left, right = normal(64, 256), normal(256, 64, seed=1)
    exact = left.double() @ right.double()
    assert (matmul.mm(left, right).double() - exact).abs().max() < 1e-6 * 256


def test_a_backend_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(matmul.BACKEND_VARIABLE, "mkl")
    with pytest.raises(UsageError, match=r"APR_DIST_CPU_MATMUL is 'mkl'.*torch or onednn"):
        cpu_matmul_backend.__wrapped__()


def test_the_backend_never_changes_within_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cpu_matmul_backend()
    other = next(backend for backend in MatmulBackend if backend is not before)
    monkeypatch.setenv(matmul.BACKEND_VARIABLE, other)
    assert cpu_matmul_backend() is before


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, window: int | None = None
) -> torch.Tensor:
    """Softmax over an explicit mask; heads already equal in number."""
    length = query.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    hidden = (distance < 0) | (distance >= (window or length))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)
