"""Packed documents see only themselves, as a dense block-diagonal mask would have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders.cuda import Operators
from builders.kernels import KernelCase
from builders.models import random_tokens, tiny_config, tiny_decoder
from builders.reference import as_stored, reference_model
from torch.nn.attention import flex_attention as flex
from torch.nn.attention import varlen

from apr_dist.model.families import Family
from apr_dist.model.kernels import cuda
from apr_dist.model.kernels.cuda import Flex, Varlen, block_mask
from apr_dist.model.kernels.plain import Attend, Kernels
from apr_dist.model.packing import Boundaries

IDS = torch.tensor([[0] * 7 + [1] * 1 + [2] * 11, [4] * 3 + [5] * 9 + [3] * 7])
WINDOWS = pytest.mark.parametrize("window", [None, 4])


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = (
        normal(2, 19, 6, 16, seed=0),
        normal(2, 19, 2, 16, seed=1),
        normal(2, 19, 2, 16, seed=2),
    )
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
    distance = torch.arange(19)[:, None] - torch.arange(19)[None, :]
    visible = (IDS[:, :, None] == IDS[:, None, :]) & (distance >= 0) & (distance < (window or 19))
    key, value = key.repeat_interleave(3, 2), value.repeat_interleave(3, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / 4.0
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


def assert_dense(attend: Attend, window: int | None) -> None:
    """Values and gradients are those of the dense mask."""
    tensors = inputs()
    found, expected = attend(*tensors), dense(*tensors, window)
    assert torch.allclose(found, expected, atol=1e-6)
    upstream = normal(*expected.shape, seed=3)
    for one, other in zip(
        torch.autograd.grad(found, tensors, upstream),
        torch.autograd.grad(expected, tensors, upstream),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-5)


@WINDOWS
def test_packed_documents_equal_the_dense_mask(window: int | None, kernels: KernelCase) -> None:
    there = Boundaries.from_ids(IDS.to(kernels.device))
    attend = kernels.kernels.attention(
        (2, 19), kernels.device, dtype=torch.float32, window=window, documents=there
    )
    assert_dense(lambda *tensors: attend(*(one.to(kernels.device) for one in tensors)).cpu(), window)


@WINDOWS
def test_the_flex_mask_equals_the_dense_mask(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "compiled_flex", lambda: flex.flex_attention)
    tensors = [tensor.detach() for tensor in inputs()]
    found = Flex(block_mask(Boundaries.from_ids(IDS), window))(*tensors)
    assert torch.allclose(found, dense(*tensors, window), atol=1e-5)


@pytest.mark.parametrize("length", [128, 300, 512, 77])
@pytest.mark.parametrize("window", [None, 1, 90, 128, 200])
def test_the_blocks_of_flex_attention_are_those_of_the_dense_mask(length: int, window: int | None) -> None:
    begins = torch.rand(3, length, generator=torch.Generator().manual_seed(0)) < 0.01
    ids = begins.cumsum(1)

    def visible(row: torch.Tensor, _: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        near = (query >= key) & (query - key < (window or length))
        return (ids[row, query] == ids[row, key]) & near

    expected = flex.create_block_mask(visible, 3, None, length, length, device="cpu")
    found = block_mask(Boundaries.from_ids(ids), window)
    assert found.shape == expected.shape
    for name in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(found, f"{name}_num_blocks")
        assert torch.equal(counts, getattr(expected, f"{name}_num_blocks"))
        listed = torch.arange(counts.shape[-1]) < counts[..., None]
        blocks = getattr(found, f"{name}_indices"), getattr(expected, f"{name}_indices")
        assert torch.equal(blocks[0].where(listed, -1), blocks[1].where(listed, -1))


def test_documents_for_flex_attention_are_found_without_a_mask() -> None:
    ids = torch.arange(4096).expand(2, -1) // 700
    with Operators() as operators:
        block_mask(Boundaries.from_ids(ids), None)
    assert max(made.numel() for call in operators.calls for made in call.made) <= 2 * 4096


def test_boundaries_may_be_known_beforehand() -> None:
    boundaries = Boundaries.from_ids(IDS)
    assert boundaries.edges.tolist() == [0, 7, 8, 19, 22, 31, 38]
    assert boundaries.edges.dtype is torch.int32
    assert boundaries.spans() == ((0, 0, 7), (0, 7, 8), (0, 8, 19), (1, 0, 3), (1, 3, 12), (1, 12, 19))
    assert boundaries.row(1).edges.tolist() == [0, 3, 12, 19]
    assert boundaries.row(0).shape == (1, 19)
    assert Boundaries.of_rows(2, 19, IDS.device).edges.tolist() == [0, 19, 38]


def dense_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: object = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """PyTorch 2.11's signature, computed on the CPU; like that one it says nothing of fewer KV heads."""
    assert query.shape == key.shape == value.shape
    assert query.dtype == key.dtype == value.dtype
    assert window_size[1] == 0
    window = None if window_size[0] < 0 else window_size[0] + 1
    edges = zip(cu_seq_q.tolist(), cu_seq_k.tolist()[1:], strict=False)
    parts = ([tensor[None, a:b] for tensor in (query, key, value)] for a, b in edges)
    causal = Kernels().causal(window)
    return torch.cat([causal(*part)[0] for part in parts])


def dense_varlen_of_groups(*args: Any, enable_gqa: bool = False, **options: Any) -> torch.Tensor:
    """The signature since: KV heads may be fewer, but only when it is said."""
    query, key, value, *others = args
    assert enable_gqa == (query.shape[1] != key.shape[1])
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    return dense_varlen(query, key, value, *others, **options)


@WINDOWS
@pytest.mark.parametrize("kernel", [dense_varlen, dense_varlen_of_groups])
def test_the_variable_length_kernel_is_called_as_its_signature_has_it(
    window: int | None, kernel: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    assert_dense(Varlen.of(Boundaries.from_ids(IDS), window), window)


def test_rows_never_join_even_with_equal_ids() -> None:
    assert Boundaries.from_ids(torch.zeros(2, 5, dtype=torch.int64)).spans() == ((0, 0, 5), (1, 0, 5))


@pytest.mark.shows("packed documents")
@pytest.mark.parametrize("family", Family)
def test_a_packed_row_is_to_each_document_what_the_reference_computes_of_it_alone(
    family: Family, kernels: KernelCase
) -> None:
    """Logits, loss and gradients."""
    config = tiny_config(family, **({"sliding_window": 4} if family is Family.MISTRAL else {}))
    ours, tokens = tiny_decoder(config), random_tokens(config, (2, 19))
    theirs = reference_model(ours)
    kernels.put(ours)
    there, ids = tokens.to(kernels.device), IDS.to(kernels.device)
    packed = ours(there, document_ids=ids)
    targets = torch.full_like(tokens, -100)
    expected = torch.zeros(())
    for row, start, stop in Boundaries.from_ids(IDS).spans():
        alone = theirs(tokens[row : row + 1, start:stop]).logits[0]
        assert (packed[row, start:stop].cpu() - alone).abs().max() < 1e-5
        targets[row, start : stop - 1] = tokens[row, start + 1 : stop]
        expected = expected + torch.nn.functional.cross_entropy(
            alone[:-1], tokens[row, start + 1 : stop], reduction="sum"
        )
    expected.backward()
    total, count = ours(there, targets.to(kernels.device), document_ids=ids)
    total.backward()
    assert count == 2 * 19 - 6
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    found = as_stored(config, {name: one.grad.cpu() for name, one in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        other = parameter.grad
        assert (found[name] - other).abs().max() < 1e-5 * other.abs().max() + 1e-6, name


def test_a_sliding_window_is_one_mask_for_all_blocks() -> None:
    model = tiny_decoder(tiny_config(Family.MISTRAL, sliding_window=4))
    tokens = random_tokens(model.config, (2, 19))
    with Operators() as operators:
        found = model(tokens)
    assert len(operators.named("aten::triu_")) == 1
    compiled = tiny_decoder(model.config)
    compiled.compile_blocks(backend="eager")
    assert torch.allclose(compiled(tokens), found, atol=1e-5)


def test_one_document_is_plain_causal_attention(kernels: KernelCase) -> None:
    model = kernels.put(tiny_decoder())
    tokens = random_tokens(model.config, (2, 19)).to(kernels.device)
    assert torch.allclose(model(tokens, document_ids=torch.zeros_like(tokens)), model(tokens), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@WINDOWS
@pytest.mark.parametrize("kernel", ["varlen", "flex"])
def test_cuda_kernels_equal_the_dense_mask(kernel: str, window: int | None) -> None:
    exact = dense(*inputs(), window)
    tensors = [tensor.detach().cuda().bfloat16().requires_grad_() for tensor in inputs()]
    documents = Boundaries.from_ids(IDS.cuda())
    attend = Varlen.of(documents, window) if kernel == "varlen" else Flex(block_mask(documents, window))
    found = attend(*tensors)
    assert torch.allclose(found.float().cpu(), exact, atol=3e-2)
    found.float().sum().backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in tensors)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", [Family.MISTRAL, Family.QWEN3])
def test_on_cuda_a_window_and_packed_documents_are_near_those_of_the_cpu(family: Family) -> None:
    model = tiny_decoder(tiny_config(family, sliding_window=4 if family is Family.MISTRAL else None))
    tokens = random_tokens(model.config, (2, 19))
    expected = model(tokens), model(tokens, document_ids=IDS)
    model.cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = model(tokens.cuda()), model(tokens.cuda(), document_ids=IDS.cuda())
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.float().cpu(), other, atol=0.1, rtol=0.1)
    (found[0].float().sum() + found[1].float().sum()).backward()
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters() if weight.grad is not None)
