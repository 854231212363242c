"""Presets say what was published, and a file's dimensions come from the file alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from builders.models import tiny_config

from apr_dist.errors import ArchitectureRefused, UsageError
from apr_dist.model.config import PRESETS, TransformerConfig, preset
from apr_dist.model.families import Family
from apr_dist.model.rope_scaling import RopeScaling, RopeScalingType

LONGROPE = {"type": "longrope", "factor": 2.0, "original_max_position_embeddings": 64}
LONGROPE |= {"short_factor": [1.0] * 32, "long_factor": [1.0] * 32}
FIELDS = (
    *("family", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"),
    *("vocab_size", "rope_theta", "rms_norm_eps", "max_position_embeddings", "qkv_bias", "qk_norm"),
    *("tie_word_embeddings", "sliding_window", "rope_scaling"),
)
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "llama-370m": (
        "llama",
        1024,
        24,
        16,
        4,
        64,
        2816,
        50257,
        1e4,
        1e-5,
        4096,
        False,
        False,
        True,
        None,
        None,
    ),
    "smollm2-135m": (
        "llama",
        576,
        30,
        9,
        3,
        64,
        1536,
        49152,
        1e5,
        1e-5,
        8192,
        False,
        False,
        True,
        None,
        None,
    ),
    "qwen2.5-0.5b": (
        "qwen2",
        896,
        24,
        14,
        2,
        64,
        4864,
        151936,
        1e6,
        1e-6,
        32768,
        True,
        False,
        True,
        None,
        None,
    ),
    "qwen2.5-1.5b": (
        "qwen2",
        1536,
        28,
        12,
        2,
        128,
        8960,
        151936,
        1e6,
        1e-6,
        32768,
        True,
        False,
        True,
        None,
        None,
    ),
    "qwen2.5-7b": (
        "qwen2",
        3584,
        28,
        28,
        4,
        128,
        18944,
        152064,
        1e6,
        1e-6,
        131072,
        True,
        False,
        False,
        None,
        None,
    ),
    "qwen2.5-coder-7b": (
        *("qwen2", 3584, 28, 28, 4, 128, 18944, 152064, 1e6, 1e-6, 32768, True, False, False, None, None),
    ),
    "qwen3-0.6b": (
        "qwen3",
        1024,
        28,
        16,
        8,
        128,
        3072,
        151936,
        1e6,
        1e-6,
        40960,
        False,
        True,
        True,
        None,
        None,
    ),
    "qwen3-4b": (
        "qwen3",
        2560,
        36,
        32,
        8,
        128,
        9728,
        151936,
        1e6,
        1e-6,
        40960,
        False,
        True,
        True,
        None,
        None,
    ),
    "qwen3-8b": (
        *("qwen3", 4096, 36, 32, 8, 128, 12288, 151936, 1e6, 1e-6, 40960, False, True, False, None, None),
    ),
    "qwen2.5-3b": (
        *("qwen2", 2048, 36, 16, 2, 128, 11008, 151936, 1e6, 1e-6, 32768, True, False, True, None, None),
    ),
    "mistral-7b": (
        *("mistral", 4096, 32, 32, 8, 128, 14336, 32000, 1e4, 1e-5, 32768, False, False, False, 4096, None),
    ),
    "llama-2-7b": (
        "llama",
        4096,
        32,
        32,
        32,
        128,
        11008,
        32000,
        1e4,
        1e-5,
        4096,
        False,
        False,
        False,
        None,
        None,
    ),
}
_GEMMA_2 = (256_000, 1e4, 1e-6, 8192, False, False, True, 4096, None)
_GEMMA_3 = (262_144, 1e6, 1e-6, 32_768, False, True, True, 512, None)
_OLMO_2 = (100_352, 5e5, 1e-6, 4096, False, True, False, None, None)
_YARN = RopeScaling(
    rope_type=RopeScalingType.YARN,
    factor=8.0,
    original_max_position_embeddings=8192,
    attention_factor=1.2079441541679836,
)
_MINISTRAL = RopeScaling(
    rope_type=RopeScalingType.YARN,
    factor=16.0,
    original_max_position_embeddings=16_384,
    attention_factor=1.0,
)
PUBLISHED |= {
    "gemma-2-2b": ("gemma2", 2304, 26, 8, 4, 256, 9216, *_GEMMA_2),
    "gemma-2-9b": ("gemma2", 3584, 42, 16, 8, 256, 14_336, *_GEMMA_2),
    "gemma-2-27b": ("gemma2", 4608, 46, 32, 16, 128, 36_864, *_GEMMA_2),
    "gemma-3-270m": ("gemma3", 640, 18, 4, 1, 256, 2048, *_GEMMA_3),
    "gemma-3-1b": ("gemma3", 1152, 26, 4, 1, 256, 6912, *_GEMMA_3),
    "olmo-2-1b": ("olmo2", 2048, 16, 16, 16, 128, 8192, *_OLMO_2),
    "olmo-2-7b": ("olmo2", 4096, 32, 32, 32, 128, 11_008, *_OLMO_2),
    "olmo-3-7b": (
        *("olmo3", 4096, 32, 32, 32, 128, 11_008, 100_278, 5e5, 1e-6, 65_536),
        *(False, True, False, 4096, _YARN),
    ),
    "granite-3.3-2b": (
        *("granite", 2048, 40, 32, 8, 64, 8192, 49_159, 1e7, 1e-5, 131_072),
        *(False, False, True, None, None),
    ),
    "phi-3-mini-4k": (
        *("phi3", 3072, 32, 32, 32, 96, 8192, 32_064, 1e4, 1e-5, 4096),
        *(False, False, False, 2047, None),
    ),
    "phi-4": (
        *("phi3", 5120, 40, 40, 10, 128, 17_920, 100_352, 2.5e5, 1e-5, 16_384),
        *(False, False, False, None, None),
    ),
    "ministral-3-8b": (
        *("ministral3", 4096, 34, 32, 8, 128, 14_336, 131_072, 1e6, 1e-5, 262_144),
        *(False, False, False, None, _MINISTRAL),
    ),
    "smollm3-3b": (
        *("smollm3", 2048, 36, 16, 4, 128, 11_008, 128_256, 5e6, 1e-6, 65_536),
        *(False, False, True, None, None),
    ),
}
PUBLISHED["qwen2.5-coder-0.5b"] = PUBLISHED["qwen2.5-0.5b"]
PUBLISHED["qwen2.5-coder-1.5b"] = PUBLISHED["qwen2.5-1.5b"]


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-001")
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_equals_the_published_configuration_in_every_field(name: str) -> None:
    config = preset(name)
    assert {key: getattr(config, key) for key in FIELDS} == dict(zip(FIELDS, PUBLISHED[name], strict=True))


def test_every_preset_is_pinned_by_a_published_row() -> None:
    assert set(PRESETS) == set(PUBLISHED)


def test_qwen25_05b_has_its_290_parameters_of_which_72_are_biases() -> None:
    shapes = preset("qwen2.5-0.5b").parameter_shapes()
    biases = [name for name in shapes if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))]
    assert (len(shapes), len(biases)) == (290, 72)
    assert preset("qwen2.5-0.5b").parameter_count() == 494_032_768


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama-370m", 322_045_952),
        ("smollm2-135m", 134_515_008),
        ("qwen3-0.6b", 596_049_920),
        ("gemma-3-270m", 268_098_176),
        ("phi-3-mini-4k", 3_821_079_552),
        ("phi-4", 14_659_507_200),
        ("gemma-2-2b", 2_614_341_888),
        ("olmo-2-1b", 1_484_916_736),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, count: int) -> None:
    assert preset(name).parameter_count() == count


def test_an_untied_model_counts_its_head() -> None:
    tied, untied = tiny_config(), tiny_config(tie_word_embeddings=False)
    assert "lm_head.weight" not in tied.parameter_shapes()
    assert untied.parameter_shapes()["lm_head.weight"] == (97, 32)
    assert untied.parameter_count() - tied.parameter_count() == 97 * 32


def test_an_unknown_preset_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"'qwen2-0.5b'.*write 'qwen2\.5-0\.5b'"):
        preset("qwen2-0.5b")


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-003")
@pytest.mark.parametrize("name", PRESETS)
def test_metadata_gives_back_every_field_it_was_written_from(name: str) -> None:
    config = preset(name)
    read = TransformerConfig.from_metadata(
        config.to_metadata(),
        family=config.family,
        where="x.apr",
        tie_word_embeddings=config.tie_word_embeddings,
    )
    assert read == config


def test_metadata_names_the_model_for_other_readers() -> None:
    values = preset("qwen2.5-0.5b").to_metadata()
    assert values["architecture"] == values["hf_model_type"] == "qwen2"
    assert values["hf_architecture"] == "Qwen2ForCausalLM"
    assert values["rope_type"] == 2
    assert values["tie_word_embeddings"] is True


NEEDED = (
    *("hidden_size", "num_layers", "num_heads", "num_kv_heads", "vocab_size", "intermediate_size"),
    *("max_position_embeddings", "rope_theta", "rms_norm_eps"),
)


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-005")
@pytest.mark.parametrize("key", NEEDED)
def test_a_dimension_the_file_does_not_state_is_refused_and_never_guessed(key: str) -> None:
    values = preset("qwen2.5-0.5b").to_metadata()
    del values[key]
    with pytest.raises(ArchitectureRefused, match=rf"does not state {key}\..*apr-dist stamp") as refusal:
        read(values)
    assert refusal.value.falsifier == "FALSIFY-APR-PRETRAIN-INIT-005"
    assert refusal.value.where == "x.apr"


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-005")
def test_an_empty_metadata_names_all_nine_missing_keys() -> None:
    with pytest.raises(ArchitectureRefused) as refusal:
        read({})
    assert all(key in str(refusal.value) for key in NEEDED)


def test_head_dim_alone_may_follow_from_the_others() -> None:
    values = preset("qwen2.5-0.5b").to_metadata()
    del values["head_dim"]
    assert read(values).head_dim == 64


def test_qwen3_must_state_its_head_dim() -> None:
    values = preset("qwen3-0.6b").to_metadata()
    del values["head_dim"]
    with pytest.raises(ArchitectureRefused, match="does not state head_dim"):
        read(values, family=Family.QWEN3)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("hidden_size", 0, "hidden_size is 0"),
        ("hidden_size", 895, "head_dim is None"),
        ("num_layers", True, "num_layers is True"),
        ("num_heads", "14", "num_heads is '14'"),
        ("num_kv_heads", 3, r"num_heads is 14.*multiple of num_kv_heads \(3\)"),
        ("head_dim", 63, "head_dim is 63.*even"),
        ("rope_theta", math.nan, "rope_theta is nan"),
        ("rms_norm_eps", 0.0, "rms_norm_eps is 0.0"),
        ("num_experts", 8, "num_experts is 8.*dense"),
        ("rope_type", 0, "rope_type is 0.*split halves"),
        ("use_sliding_window", True, "use_sliding_window is True"),
        ("rope_scaling", "yarn", "rope_scaling is 'yarn'"),
        ("rope_scaling", {"type": "longrope", "factor": 2.0}, "original_max_position_embeddings is None"),
        ("rope_scaling", LONGROPE | {"short_factor": None}, "short_factor is None"),
        ("rope_scaling", LONGROPE | {"long_factor": [1.0] * 31 + [0]}, "long_factor is .*positive"),
        ("rope_scaling", LONGROPE | {"long_factor": [1.0] * 4}, "long_factor is '4 numbers'.*32 numbers"),
        ("rope_scaling", LONGROPE | {"long_factor": 2.0}, "long_factor is 2.0.*list of numbers"),
        ("rope_scaling", {"type": "ntk", "factor": 2.0}, "'ntk'.*linear, dynamic, llama3, yarn, longrope"),
        ("llama_4_scaling_beta", 0.1, "llama_4_scaling_beta is 0.1.*null for the qwen2 family"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5.*1.0 for the qwen2 family"),
        ("rope_scaling", {"type": "linear"}, "no factor"),
        ("rope_scaling", {"type": "linear", "factor": 0.5}, "factor is 0.5"),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings is None"),
        ("rope_scaling", {"type": "linear", "factor": 2.0, "mscale": 1.0}, r"unknown keys \['mscale'\]"),
        ("rope_scaling", {"type": "linear", "factor": "2"}, "rope_scaling.factor is '2'"),
    ],
)
@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-005")
def test_an_impossible_value_is_refused_by_key_and_value(key: str, value: object, text: str) -> None:
    values = preset("qwen2.5-0.5b").to_metadata() | {"sliding_window": 32768, key: value}
    if key == "hidden_size":
        del values["head_dim"]
    with pytest.raises(ArchitectureRefused, match=text) as refusal:
        read(values)
    assert refusal.value.where == "x.apr"


def test_a_window_that_qwen2_states_and_does_not_use_changes_nothing() -> None:
    values = preset("qwen2.5-0.5b").to_metadata() | {"sliding_window": 32768, "use_sliding_window": False}
    assert read(values).sliding_window is None


def test_a_window_on_another_family_than_mistral_is_refused() -> None:
    with pytest.raises(ArchitectureRefused, match="sliding_window is 8"):
        tiny_config(sliding_window=8)


SCALINGS = [
    RopeScaling(rope_type=RopeScalingType.LINEAR, factor=2.0),
    RopeScaling(
        rope_type=RopeScalingType.LLAMA3,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    RopeScaling(
        rope_type=RopeScalingType.YARN, factor=4.0, original_max_position_embeddings=32768, truncate=False
    ),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling.rope_type)
def test_rope_scaling_survives_metadata(scaling: RopeScaling) -> None:
    config = replace(preset("qwen2.5-0.5b"), rope_scaling=scaling)
    assert read(config.to_metadata()) == config


def test_rope_scaling_reads_the_old_spelling_and_plain_rope() -> None:
    assert RopeScaling.from_mapping({"type": "linear", "factor": 2}, where="x") == SCALINGS[0]
    assert RopeScaling.from_mapping({"rope_type": "default", "rope_theta": 1e4}, where="x") is None
    assert RopeScaling.from_mapping(None, where="x") is None


def read(values: dict[str, Any], *, family: Family = Family.QWEN2) -> TransformerConfig:
    return TransformerConfig.from_metadata(values, family=family, where="x.apr", tie_word_embeddings=True)


@pytest.mark.parametrize("family", list(Family))
def test_kinds_of_parameters_are_all_parameters(family: Family) -> None:
    for layers, tied in ((1, True), (3, False)):
        config = tiny_config(family, num_layers=layers, tie_word_embeddings=tied)
        kinds = Counter[tuple[int, ...]]()
        for name, shape, times in config.kinds_of_parameters():
            assert config.parameter_shapes()[name] == shape
            kinds[shape] += times
        assert kinds == Counter(config.parameter_shapes().values())
