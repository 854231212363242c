"""Operations per token are what the network really does; peaks are those of the device, or none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from builders.models import OPTIONS, random_tokens, tiny_config, tiny_decoder
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from apr_dist.config.sections import AdapterSection
from apr_dist.gates.adapters import adapter_of
from apr_dist.model.config import preset
from apr_dist.model.families import Family
from apr_dist.model.flops import LOGITS_CHUNK_BYTES, flops_per_token, logits_chunk, peak_flops
from apr_dist.model.kernels import products as matmul
from apr_dist.model.kernels.products import cpu_matmul_backend


@pytest.fixture
def _counted_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The counter knows PyTorch's own products only."""
    monkeypatch.setenv(matmul.BACKEND_VARIABLE, "torch")
    cpu_matmul_backend.cache_clear()
    yield
    cpu_matmul_backend.cache_clear()


@pytest.mark.usefixtures("_counted_products")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", Family)
def test_the_formula_equals_what_the_flop_counter_counts(family: Family, tied: bool, backward: bool) -> None:
    wide = (
        {"sliding_window": 32} if "sliding_window" in OPTIONS.get(family, {}) else {}
    )  # a mask of a window hides no product
    model = tiny_decoder(tiny_config(family, tie_word_embeddings=tied, **wide))
    tokens = random_tokens(model.config, (2, 17))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if backward:
            model(tokens[:, :-1], tokens[:, 1:])[0].backward()
        else:
            model(tokens[:, :-1])
    assert counter.get_total_flops() == 2 * 16 * flops_per_token(model.config, 16, backward=backward)


@pytest.mark.usefixtures("_counted_products")
@pytest.mark.parametrize("layers", [None, "1"], ids=["all blocks", "the last block"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_frozen_weights_have_no_gradient_that_is_counted(layers: str | None, tied: bool) -> None:
    config = tiny_config(Family.LLAMA, tie_word_embeddings=tied)
    asked = AdapterSection.model_validate({"kind": "lora", "rank": 3, "layers": layers})
    adapter = adapter_of(asked, config)
    assert adapter is not None
    model = tiny_decoder(config)
    model.attach(adapter)
    tokens = random_tokens(config, (2, 17))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens[:, :-1], tokens[:, 1:])[0].backward()
    # Nothing below the first block with an adapter asks for a gradient of what q, k and v read.
    unasked = 2 * config.hidden_size * (config.query_size + 2 * config.kv_size + 3 * 3)
    found = flops_per_token(config, 16, adapter=adapter)
    assert counter.get_total_flops() == 2 * 16 * (found - unasked)
    assert found < flops_per_token(config, 16)


def test_a_window_bounds_the_positions_that_are_scored() -> None:
    narrow, wide = (tiny_config(Family.MISTRAL, sliding_window=window) for window in (8, None))
    assert flops_per_token(narrow, 32) == flops_per_token(wide, 8) < flops_per_token(wide, 32)
    assert flops_per_token(narrow, 4) == flops_per_token(wide, 4)


def test_the_figure_of_a_known_model() -> None:
    matrices = 494_032_768 - 49 * 896 - 24 * (896 + 128 + 128)
    assert flops_per_token(preset("qwen2.5-0.5b"), 2048) == 6 * matrices + 12 * 24 * 896 * 2048


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H200", torch.bfloat16, 989.4e12),
        ("NVIDIA A100-SXM4-80GB", torch.float16, 312e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5e12),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2e12),
        ("AMD Instinct MI300X", torch.bfloat16, 1307.4e12),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090 D", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA H20", torch.bfloat16, None),
        ("Some New Device", torch.bfloat16, None),
        ("cpu", torch.float32, None),
        ("NVIDIA H200", torch.int8, None),
    ],
)
def test_a_device_has_its_published_peak_or_none(name: str, dtype: torch.dtype, peak: float | None) -> None:
    assert peak_flops(name, dtype) == peak


@pytest.mark.parametrize("vocab_size", [1_000, 49_152, 151_936, 10**9])
@pytest.mark.parametrize("tokens", [0, 1, 100, 1_024, 16_384, 16_385])
def test_chunks_of_logits_are_alike_and_as_few_as_fit(tokens: int, vocab_size: int) -> None:
    chunk = logits_chunk(tokens, vocab_size, 4)
    most = max(1, LOGITS_CHUNK_BYTES // (4 * vocab_size))
    assert 1 <= chunk <= most
    sizes = [min(chunk, tokens - start) for start in range(0, tokens, chunk)]
    assert not sizes or sizes[0] - sizes[-1] < 16 * len(sizes)
    # Only what the whole multiples leave of the limit may cost a chunk more.
    assert len(sizes) <= -(-tokens // max(1, most - most % 16 if most >= 16 else most))


def test_a_batch_that_needs_two_chunks_is_halved() -> None:
    assert logits_chunk(1_024, 49_152, 4) == 512
    assert logits_chunk(1_024, 49_152, 2) == 1_024
