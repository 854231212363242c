"""On every set of kernels logits and gradients equal ``transformers`` in every family, weight for weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders.kernels import KernelCase
from builders.models import random_tokens, tiny_config, tiny_decoder
from builders.reference import as_stored, reference_model

from apr_dist.errors import ArchitectureRefused
from apr_dist.model.config import TransformerConfig
from apr_dist.model.families import Family
from apr_dist.model.rope_scaling import RopeScaling, RopeScalingType

SCALINGS = {
    "linear": RopeScaling(rope_type=RopeScalingType.LINEAR, factor=4.0),
    "dynamic": RopeScaling(rope_type=RopeScalingType.DYNAMIC, factor=3.0),
    "longrope": RopeScaling(
        rope_type=RopeScalingType.LONGROPE,
        factor=4.0,
        original_max_position_embeddings=16,
        short_factor=tuple(1.0 + pair / 8 for pair in range(8)),
        long_factor=tuple(1.5 + pair for pair in range(8)),
    ),
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


@pytest.mark.parametrize("length", [16, 17, 64, 65, 100])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaled_rope_equals_the_reference_up_to_the_original_length_and_beyond(
    scaling: str, length: int
) -> None:
    config = tiny_config(rope_scaling=SCALINGS[scaling], head_dim=16, hidden_size=64)
    ours = tiny_decoder(config, seed=1)
    tokens = random_tokens(config, (1, length))
    with torch.no_grad():
        expected = reference_model(ours)(tokens).logits
        assert (ours(tokens) - expected).abs().max() < 1e-5


@pytest.mark.shows("RoPE beyond its length")
@pytest.mark.parametrize("family", Family)
def test_a_scaling_of_the_family_equals_the_reference_beyond_the_original_length(family: Family) -> None:
    allowed = family.definition.rope_scalings
    name = next(one for one in ("yarn", "longrope") if SCALINGS[one].rope_type in allowed)
    changes = {"partial_rotary_factor": 1.0} if family is Family.PHI3 else {}
    config = tiny_config(family, rope_scaling=SCALINGS[name], head_dim=16, hidden_size=64, **changes)
    ours, tokens = tiny_decoder(config, seed=1), random_tokens(config, (1, 40))
    with torch.no_grad():
        assert (ours(tokens) - reference_model(ours)(tokens).logits).abs().max() < 1e-5


@pytest.mark.parametrize("family", [Family.LLAMA, Family.PHI3])
@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_each_packed_document_rotates_by_its_own_length(family: Family, scaling: str) -> None:
    """A short document beside a long one is what it is alone, as in a reference that sees it alone."""
    if family is Family.PHI3 and scaling == "dynamic":
        with pytest.raises(ArchitectureRefused, match="rope_type is 'dynamic'"):
            tiny_config(family, rope_scaling=SCALINGS[scaling])
        return
    changes = {"partial_rotary_factor": 1.0} if family is Family.PHI3 else {}
    config = tiny_config(family, rope_scaling=SCALINGS[scaling], head_dim=16, hidden_size=64, **changes)
    ours = tiny_decoder(config, seed=1)
    lengths = (70, 9, 30)
    tokens = random_tokens(config, (1, sum(lengths)))
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    with torch.no_grad():
        found = ours(tokens, document_ids=documents)[0].split(lengths)
        for one, part in zip(found, tokens[0].split(lengths), strict=True):
            assert (one - reference_model(ours)(part[None]).logits[0]).abs().max() < 1e-5


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
    found = as_stored(config, {name: one.grad.cpu() for name, one in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        other = parameter.grad
        assert (found[name] - other).abs().max() < 1e-5 * other.abs().max() + 1e-8, name
