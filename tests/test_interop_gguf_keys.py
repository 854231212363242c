"""Every key of a GGUF file is read as llama.cpp or its converter means it, or refused by its name."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from builders.files import write_gguf
from builders.hf_models import SIZES, claims, hf_folder, imported_logits, logits_of, reference_logits
from safetensors.torch import load_file

from apr_dist.apr.reader import AprReader
from apr_dist.errors import UnsupportedModelFile
from apr_dist.interop.gguf_export import GgufType, export_gguf
from apr_dist.interop.hf_export import export_huggingface
from apr_dist.interop.importing import import_model
from apr_dist.model.families import Family

METADATA = int(os.environ.get("APR_DIST_CONFIGURATIONS", "40"))
"""Random metadata that are tried; ``make families`` tries a thousand."""

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
BLOCK = {
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def converted(
    folder: Path, target: Path, *, more: dict[str, np.ndarray] | None = None, **fields: Any
) -> Path:
    """What llama.cpp's converter makes of a Llama folder: names, row order, its usual fields."""
    stored = dict(more or {})
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem, _, kind = name.rpartition(".")
        values = tensor.numpy()
        if stem.startswith("model.layers."):
            layer, part = stem.removeprefix("model.layers.").split(".", 1)
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = 4 if "q_proj" in part else 2
                values = values.reshape(heads, 2, 4, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
            stored[f"blk.{layer}.{BLOCK[part]}.{kind}"] = values
        else:
            stored[f"{ENDS[stem]}.{kind}"] = values
    written = {
        "embedding_length": 32,
        "block_count": 2,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "feed_forward_length": 40,
        "context_length": 64,
        "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": 1e-6,
    } | {key.replace("__", "."): value for key, value in fields.items()}
    return write_gguf(
        target, stored, architecture="llama", fields={f"llama.{key}": one for key, one in written.items()}
    )


def llama(folder: Path, **config: Any) -> Path:
    return hf_folder(folder, claims(Family.LLAMA) | SIZES | config)


def scaling(**fields: Any) -> dict[str, Any]:
    return {f"rope.scaling.{key}": value for key, value in fields.items()}


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


YARN_FIELDS = scaling(type="yarn", factor=4.0, original_context_length=16)
PAPER = 0.1 * math.log(4.0) + 1.0


@pytest.mark.parametrize(
    ("rope", "fields"),
    [
        (YARN, YARN_FIELDS),
        (YARN | {"beta_fast": 16.0, "beta_slow": 2.0}, scaling(yarn_beta_fast=16.0, yarn_beta_slow=2.0)),
        (YARN | {"attention_factor": 1.5}, scaling(yarn_attn_factor=1.5)),
        (YARN | {"attention_factor": 0.7 * PAPER}, scaling(attn_factor=0.7)),
        (YARN | {"attention_factor": 1.5}, scaling(yarn_attn_factor=1.5, attn_factor=1.5 / PAPER)),
        (YARN, scaling(yarn_ext_factor=1.0, finetuned=True)),
        (YARN | {"original_max_position_embeddings": 64}, {"rope.scaling.original_context_length": 64}),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, scaling(type="linear", factor=2.0)),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, scaling(factor=2.0)),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, {"rope.scale_linear": 2.0}),
        ({"rope_type": "default", "rope_theta": 1e4}, scaling(type="none", factor=2.0)),
        ({"rope_type": "default", "rope_theta": 777.0}, {"rope.freq_base": 777.0}),
    ],
)
def test_rotary_scaling_is_read_and_written_as_it_is_meant(
    rope: dict[str, Any], fields: dict[str, Any], tmp_path: Path
) -> None:
    folder = llama(tmp_path / "in", rope_parameters=rope)
    if rope["rope_type"] == "yarn":
        fields = YARN_FIELDS | fields
    source = converted(
        folder, tmp_path / "x.gguf", **{key.replace(".", "__"): one for key, one in fields.items()}
    )
    expected = reference_logits(folder)
    assert_equal(imported_logits(source, tmp_path / "x.apr"), expected)
    export_gguf(tmp_path / "x.apr", tmp_path / "y.gguf", kind=GgufType.F32)
    assert_equal(imported_logits(tmp_path / "y.gguf", tmp_path / "y.apr"), expected)
    export_huggingface(tmp_path / "x.apr", tmp_path / "out")
    assert_equal(reference_logits(tmp_path / "out"), expected)


def converter_divisors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """``rope_freqs.weight`` by the rule of llama.cpp's converter: three cases of the wavelength."""
    original, low, high = (
        rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    divisors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * pair / head_dim)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(rope["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize(
    ("factor", "low", "high", "original", "theta"),
    [
        (8.0, 1.0, 4.0, 8192, 5e5),
        (32.0, 1.0, 4.0, 8192, 5e5),
        (8.0, 1.0, 4.0, 32, 1e4),
        (4.0, 1.0, 4.0, 16, 50.0),
        (2.0, 0.5, 6.0, 64, 30.0),
        (3.5, 2.0, 3.0, 100, 100.0),
        (6.0, 0.7, 1.1, 48, 12.0),
        (2.0, 3.0, 9.0, 40, 200.0),
    ],
)
def test_llama_3_scaling_is_read_from_its_tensor_and_written_again(
    factor: float, low: float, high: float, original: int, theta: float, tmp_path: Path
) -> None:
    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    rope |= {"original_max_position_embeddings": original, "rope_theta": theta}
    folder = llama(tmp_path / "in", rope_parameters=rope)
    tensor = {"rope_freqs.weight": converter_divisors(rope, 8)}
    source = converted(folder, tmp_path / "x.gguf", more=tensor, rope__freq_base=theta)
    expected = reference_logits(folder)
    assert_equal(imported_logits(source, tmp_path / "x.apr"), expected)
    import_model(folder, tmp_path / "z.apr")
    export_gguf(tmp_path / "z.apr", tmp_path / "z.gguf", kind=GgufType.F32)
    (written,) = [
        one for one in gguf.GGUFReader(tmp_path / "z.gguf").tensors if one.name == "rope_freqs.weight"
    ]
    np.testing.assert_allclose(written.data, tensor["rope_freqs.weight"], rtol=1e-6)
    assert_equal(imported_logits(tmp_path / "z.gguf", tmp_path / "back.apr"), expected)


def test_rotary_divisors_of_no_known_rule_are_refused(tmp_path: Path) -> None:
    folder = llama(tmp_path / "in")
    odd = {"rope_freqs.weight": np.array([1.0, 7.0, 2.0, 3.0], np.float32)}
    with pytest.raises(UnsupportedModelFile, match=r"rope_freqs\.weight"):
        import_model(converted(folder, tmp_path / "x.gguf", more=odd), tmp_path / "x.apr")
    ones = {"rope_freqs.weight": np.ones(4, np.float32)}
    assert_equal(
        imported_logits(converted(folder, tmp_path / "y.gguf", more=ones), tmp_path / "y.apr"),
        reference_logits(folder),
    )


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("llama.attention.clamp_kqv", 8.0, "attention.clamp_kqv is 8"),
        ("llama.attention.scale", 0.5, "attention.scale"),
        ("llama.logit_scale", 0.1, "logit_scale"),
        ("llama.attention.causal", False, "causal"),
        ("llama.attention.sliding_window", 16, "sliding_window"),
        ("llama.rope.scaling.yarn_ext_factor", 0.5, "yarn_ext_factor"),
        ("llama.rope.scaling.attn_factor", 1.2, "attn_factor"),
        ("llama.rope.scaling.yarn_log_multiplier", 0.1, "yarn_log_multiplier"),
        ("llama.attention.temperature_scale", 0.1, "not known what that changes"),
        ("llama.new_thing", 1, "llama.new_thing"),
        ("tokenizer.ggml.new_thing", 1, "tokenizer.ggml.new_thing"),
        ("split.count", 2, "one of 2 parts"),
    ],
)
def test_a_key_that_could_change_logits_or_tokens_is_refused_by_name(
    key: str, value: object, match: str, tmp_path: Path
) -> None:
    fields = {"llama.embedding_length": 32, "llama.attention.head_count": 4, "llama.block_count": 2}
    fields |= {"llama.feed_forward_length": 40, "llama.context_length": 64}
    fields |= {"llama.attention.layer_norm_rms_epsilon": 1e-6, key: value}
    path = write_gguf(tmp_path / "x.gguf", {}, architecture="llama", fields=fields)
    with pytest.raises(UnsupportedModelFile, match=match) as refusal:
        import_model(path, tmp_path / "x.apr")
    assert key.rpartition(".")[2] in refusal.value.what or key == "split.count"


def test_keys_that_change_nothing_pass(tmp_path: Path) -> None:
    folder = llama(tmp_path / "in")
    more = {"vocab_size": 48, "expert_count": 0, "rope__scaling__finetuned": False, "logit_scale": 1.0}
    assert_equal(
        imported_logits(converted(folder, tmp_path / "x.gguf", **more), tmp_path / "x.apr"),
        reference_logits(folder),
    )


def test_biases_on_q_k_v_and_o_travel_to_a_folder(tmp_path: Path) -> None:
    folder = llama(tmp_path / "in", attention_bias=True)
    source = converted(folder, tmp_path / "x.gguf")
    assert_equal(imported_logits(source, tmp_path / "x.apr"), reference_logits(folder))
    export_huggingface(tmp_path / "x.apr", tmp_path / "out")
    assert_equal(reference_logits(tmp_path / "out"), reference_logits(folder))


@pytest.mark.parametrize("window", [None, 4])
def test_a_window_is_stated_in_a_folder_and_refused_where_it_cannot_be(
    window: int | None, tmp_path: Path
) -> None:
    folder = hf_folder(tmp_path / "in", claims(Family.MISTRAL) | SIZES | {"sliding_window": window})
    expected = reference_logits(folder)
    assert_equal(imported_logits(folder, tmp_path / "x.apr"), expected)
    export_huggingface(tmp_path / "x.apr", tmp_path / "out")
    assert_equal(reference_logits(tmp_path / "out"), expected)
    if window is None:
        export_gguf(tmp_path / "x.apr", tmp_path / "x.gguf", kind=GgufType.F32)
        assert_equal(imported_logits(tmp_path / "x.gguf", tmp_path / "y.apr"), expected)
        return
    with pytest.raises(UnsupportedModelFile, match="window of 4 tokens"):
        export_gguf(tmp_path / "x.apr", tmp_path / "x.gguf")


def test_a_head_size_of_width_over_heads_is_stated_where_the_default_is_another(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "in", claims(Family.QWEN3) | SIZES)
    import_model(folder, tmp_path / "x.apr")
    export_gguf(tmp_path / "x.apr", tmp_path / "x.gguf", kind=GgufType.F32)
    import_model(tmp_path / "x.gguf", tmp_path / "y.apr")
    assert_equal(logits_of(tmp_path / "y.apr"), reference_logits(folder))
    export_huggingface(tmp_path / "y.apr", tmp_path / "out")
    assert_equal(reference_logits(tmp_path / "out"), reference_logits(folder))
    assert AprReader(tmp_path / "y.apr").metadata.head_dim == 8


CHOICES: dict[str, list[Any]] = {
    "rope.freq_base": [100.0, 5e5],
    "rope.scaling.type": ["none", "linear", "yarn", "longrope"],
    "rope.scaling.factor": [0.0, 1.0, 2.0, 4.0],
    "rope.scale_linear": [0.0, 2.0],
    "rope.scaling.original_context_length": [16, 48],
    "rope.scaling.attn_factor": [1.0, 0.8],
    "rope.scaling.yarn_attn_factor": [1.3],
    "rope.scaling.yarn_beta_fast": [32.0, 8.0],
    "rope.scaling.yarn_beta_slow": [1.0, 2.0],
    "rope.scaling.yarn_ext_factor": [-1.0, 1.0, 0.5],
    "rope.scaling.yarn_log_multiplier": [0.0, 0.1],
    "rope.scaling.finetuned": [True, False],
    "rope.dimension_count": [8, 4],
    "attention.key_length": [8],
    "attention.value_length": [8, 4],
    "attention.layer_norm_rms_epsilon": [1e-6, 0.1],
    "attention.layer_norm_epsilon": [0.1],
    "attention.clamp_kqv": [0.0, 3.0],
    "attention.scale": [0.0, 0.3],
    "attention.causal": [True, False],
    "attention.sliding_window": [0, 4],
    "expert_count": [0, 4],
    "logit_scale": [0.0, 1.0, 0.5],
    "vocab_size": [48],
    "nothing_known": [1],
}
HARMLESS = {
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.dimension_count": (8,),
    "attention.value_length": (8,),
    "attention.clamp_kqv": (0.0,),
    "attention.scale": (0.0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "logit_scale": (0.0, 1.0),
    "nothing_known": (),
}


def expected_config(fields: dict[str, Any]) -> dict[str, Any] | None:
    """The ``config.json`` that these fields mean by llama.cpp's rules; None for what must be refused."""
    if any(fields[key] not in allowed for key, allowed in HARMLESS.items() if key in fields):
        return None
    kind = fields.get("rope.scaling.type", "linear")
    factor = fields.get("rope.scaling.factor", fields.get("rope.scale_linear", 0.0)) or 1.0
    multiplier = fields.get("rope.scaling.attn_factor", 1.0)
    whole = fields.get("rope.scaling.yarn_attn_factor")
    rope = {"rope_type": "default", "rope_theta": fields.get("rope.freq_base", 10000.0)}
    if kind == "longrope" or (kind != "yarn" and multiplier != 1.0) or (whole and multiplier != 1.0):
        return None
    if kind == "linear" and factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor}
        rope["original_max_position_embeddings"] = fields.get("rope.scaling.original_context_length", 64)
        rope["beta_fast"] = fields.get("rope.scaling.yarn_beta_fast", 32.0)
        rope["beta_slow"] = fields.get("rope.scaling.yarn_beta_slow", 1.0)
        rope["attention_factor"] = whole or multiplier * (0.1 * math.log(factor) + 1.0)
    return {"rope_parameters": rope, "rms_norm_eps": fields.get("attention.layer_norm_rms_epsilon", 1e-6)}


def test_random_metadata_give_equal_logits_or_are_refused_by_their_key(tmp_path: Path) -> None:
    folder, equal, refused = llama(tmp_path / "in"), 0, 0
    original = json.loads((folder / "config.json").read_text())
    for number in range(METADATA):
        choose = random.Random(number)
        keys = choose.sample(sorted(CHOICES), choose.randint(0, 5))
        fields = {key: choose.choice(CHOICES[key]) for key in keys}
        named = {key.replace(".", "__"): value for key, value in fields.items()}
        source, config = converted(folder, tmp_path / "x.gguf", **named), expected_config(fields)
        if config is None:
            with pytest.raises(UnsupportedModelFile) as refusal:
                import_model(source, tmp_path / "x.apr", overwrite=True)
            what = refusal.value.what.replace("expert_used_count", "expert_count")
            assert any(key.removeprefix("rope.scaling.") in what for key in fields), fields
            refused += 1
            continue
        (folder / "config.json").write_text(json.dumps(original | config))
        found = imported_logits(source, tmp_path / "x.apr")
        assert torch.allclose(found, reference_logits(folder), atol=2e-4, rtol=1e-4), fields
        equal += 1
    assert equal
    assert refused
