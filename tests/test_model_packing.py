"""Packed documents see only themselves, as a dense block-diagonal mask would have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders.cuda import Operators
from builders.models import random_tokens, tiny_config, tiny_decoder
from torch.nn.attention import flex_attention as flex
from torch.nn.attention import varlen

from apr_dist.model import packing, transformer
from apr_dist.model.attention import causal_attention
from apr_dist.model.config import Family
from apr_dist.model.packing import Boundaries, PackedKernel, attend_documents, find_documents, packed_kernel

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


def attend(kernel: PackedKernel, window: int | None, *tensors: torch.Tensor) -> torch.Tensor:
    documents = find_documents(IDS, dtype=torch.float32, window=window, kernel=kernel)

    def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return causal_attention(query, key, value, window=window)

    return attend_documents(*tensors, documents=documents, causal=causal, window=window)


@WINDOWS
def test_spans_equal_the_dense_mask_value_and_gradients(window: int | None) -> None:
    tensors = inputs()
    found, expected = attend(PackedKernel.SPANS, window, *tensors), dense(*tensors, window)
    assert torch.allclose(found, expected, atol=1e-6)
    upstream = normal(*expected.shape, seed=3)
    for one, other in zip(
        torch.autograd.grad(found, tensors, upstream),
        torch.autograd.grad(expected, tensors, upstream),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-5)


@WINDOWS
def test_the_flex_mask_equals_the_dense_mask(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_compiled_flex", lambda: flex.flex_attention)
    tensors = [tensor.detach() for tensor in inputs()]
    found = attend(PackedKernel.FLEX, window, *tensors)
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
    found = find_documents(ids, dtype=torch.float32, window=window, kernel=PackedKernel.FLEX).block_mask
    assert found is not None
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
        find_documents(ids, dtype=torch.float32, kernel=PackedKernel.FLEX)
    assert max(made.numel() for call in operators.calls for made in call.made) <= 2 * 4096


def test_boundaries_may_be_known_beforehand() -> None:
    boundaries = Boundaries.from_ids(IDS)
    assert find_documents(boundaries, dtype=torch.float32) == find_documents(IDS, dtype=torch.float32)
    assert boundaries.row(1).edges.tolist() == [0, 3, 12, 19]
    assert boundaries.row(0).shape == (1, 19)
    assert Boundaries.of_rows(2, 19, IDS.device).edges.tolist() == [0, 19, 38]


def test_boundaries_of_the_variable_length_kernel_are_the_documents() -> None:
    documents = find_documents(IDS, dtype=torch.bfloat16, kernel=PackedKernel.VARLEN)
    assert documents.boundaries is not None
    assert documents.boundaries.tolist() == [0, 7, 8, 19, 22, 31, 38]
    assert documents.boundaries.dtype is torch.int32
    assert documents.longest == 19


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
    return torch.cat([causal_attention(*part, window=window)[0] for part in parts])


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
    tensors = inputs()
    found, expected = attend(PackedKernel.VARLEN, window, *tensors), dense(*tensors, window)
    assert torch.allclose(found, expected, atol=1e-6)
    for one, other in zip(
        torch.autograd.grad(found.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-5)


def test_rows_never_join_even_with_equal_ids() -> None:
    documents = find_documents(torch.zeros(2, 5, dtype=torch.int64), dtype=torch.float32)
    assert documents.spans == ((0, 0, 5), (1, 0, 5))


def test_the_cpu_attends_document_by_document() -> None:
    assert packed_kernel(torch.device("cpu"), torch.bfloat16) is PackedKernel.SPANS


@pytest.mark.parametrize("family", [Family.QWEN3, Family.MISTRAL])
def test_a_packed_row_gives_each_document_the_logits_it_has_alone(family: Family) -> None:
    config = tiny_config(family, sliding_window=4 if family is Family.MISTRAL else None)
    model, tokens = tiny_decoder(config), random_tokens(config, (2, 19))
    packed = model(tokens, document_ids=IDS)
    for row, start, stop in find_documents(IDS, dtype=torch.float32).spans:
        alone = model(tokens[row : row + 1, start:stop])
        assert torch.allclose(packed[row, start:stop], alone[0], atol=1e-4)


def test_a_sliding_window_is_one_mask_for_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_decoder(tiny_config(Family.MISTRAL, sliding_window=4))
    tokens = random_tokens(model.config, (2, 19))
    with Operators() as operators:
        found = model(tokens)
    assert len(operators.named("aten::triu_")) == 1
    compiled = tiny_decoder(model.config)
    compiled.compile_blocks(backend="eager")
    assert torch.allclose(compiled(tokens), found, atol=1e-5)
    monkeypatch.setattr(transformer, "find_windows", lambda *_, **__: None)
    assert torch.equal(model(tokens), found)


def test_one_document_is_plain_causal_attention() -> None:
    model = tiny_decoder()
    tokens = random_tokens(model.config, (2, 19))
    assert torch.allclose(model(tokens, document_ids=torch.zeros_like(tokens)), model(tokens), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@WINDOWS
@pytest.mark.parametrize("kernel", [PackedKernel.VARLEN, PackedKernel.FLEX])
def test_cuda_kernels_equal_the_dense_mask(kernel: PackedKernel, window: int | None) -> None:
    exact = dense(*inputs(), window)
    tensors = [tensor.detach().cuda().bfloat16().requires_grad_() for tensor in inputs()]
    documents = find_documents(IDS.cuda(), dtype=torch.bfloat16, window=window, kernel=kernel)
    found = attend_documents(*tensors, documents=documents, causal=causal_attention, window=window)
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
