"""On every set of kernels logits and gradients equal ``transformers`` in every family, weight for weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders.kernels import KernelCase
from builders.models import random_tokens, tiny_config, tiny_decoder
from builders.reference import reference_model

from apr_dist.model.config import TransformerConfig
from apr_dist.model.families import Family
from apr_dist.model.rope_scaling import RopeScaling, RopeScalingType

SCALINGS = {
    "linear": RopeScaling(rope_type=RopeScalingType.LINEAR, factor=4.0),
    "llama3": RopeScaling(
        rope_type=RopeScalingType.LLAMA3,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    ),
    "yarn": RopeScaling(rope_type=RopeScalingType.YARN, factor=4.0, original_max_position_embeddings=16),
    "yarn, its own factor": RopeScaling(
        rope_type=RopeScalingType.YARN,
        factor=4.0,
        original_max_position_embeddings=32,
        attention_factor=1.3,
        beta_fast=16.0,
        beta_slow=2.0,
        truncate=False,
    ),
}


def assert_equal_to_reference(config: TransformerConfig, kernels: KernelCase, *, length: int = 24) -> None:
    ours = tiny_decoder(config, seed=1)
    theirs = reference_model(ours)
    tokens = random_tokens(config, (2, length))
    with torch.no_grad():
        found = kernels.put(ours)(tokens.to(kernels.device)).cpu()
        assert (found - theirs(tokens).logits).abs().max() < 1e-5


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-004")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", Family)
def test_logits_equal_the_reference(family: Family, tied: bool, kernels: KernelCase) -> None:
    assert_equal_to_reference(tiny_config(family, tie_word_embeddings=tied), kernels)


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-004")
@pytest.mark.parametrize("ratio", [1, 2, 4, 7, 8])
@pytest.mark.parametrize("family", [Family.LLAMA, Family.QWEN2])
def test_any_ratio_of_grouped_queries_equals_the_reference(
    family: Family, ratio: int, kernels: KernelCase
) -> None:
    heads = 2 * ratio
    assert_equal_to_reference(
        tiny_config(family, num_heads=heads, num_kv_heads=2, hidden_size=8 * heads), kernels
    )


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("family", [Family.LLAMA, Family.QWEN2, Family.QWEN3])
def test_scaled_rope_equals_the_reference(family: Family, scaling: str, kernels: KernelCase) -> None:
    config = tiny_config(family, rope_scaling=SCALINGS[scaling], head_dim=16, hidden_size=64)
    assert_equal_to_reference(config, kernels, length=60)


@pytest.mark.parametrize("window", [4, 64])
def test_a_mistral_window_equals_the_reference(window: int, kernels: KernelCase) -> None:
    assert_equal_to_reference(tiny_config(Family.MISTRAL, sliding_window=window), kernels)


@pytest.mark.parametrize("theta", [1e4, 1e5, 1e6])
def test_every_rope_base_equals_the_reference(theta: float, kernels: KernelCase) -> None:
    assert_equal_to_reference(replace(tiny_config(), rope_theta=theta), kernels, length=64)


@pytest.mark.parametrize("family", Family)
def test_gradients_equal_the_reference(family: Family, kernels: KernelCase) -> None:
    config = tiny_config(family)
    ours = tiny_decoder(config, seed=1)
    theirs = reference_model(ours)
    tokens = random_tokens(config, (2, 17))
    there = tokens.to(kernels.device)
    total, count = kernels.put(ours)(there[:, :-1], there[:, 1:])
    (total / count).backward()
    logits = theirs(tokens[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    expected.backward()
    assert (total / count).item() == pytest.approx(expected.item(), rel=1e-6)
    reference_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        other = reference_gradients[name]
        assert (parameter.grad.cpu() - other).abs().max() < 1e-5 * other.abs().max() + 1e-8, name
