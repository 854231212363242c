"""Rotations in files: what published configurations state, and what converters and older releases read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from builders.families import odd_config
from builders.hf_models import hf_folder, logits_of
from builders.models import random_tokens, tiny_config, tiny_decoder

from apr_dist.errors import ArchitectureRefused, DamagedModelFile, UsageError
from apr_dist.gates import preflight
from apr_dist.interop.gguf_export import GgufType, export_gguf
from apr_dist.interop.hf_config import metadata_from_config
from apr_dist.interop.hf_export import export_huggingface
from apr_dist.interop.importing import import_model
from apr_dist.model.config import TransformerConfig
from apr_dist.model.families import Family
from apr_dist.model.generation import Sampling, generate
from apr_dist.model.rope_scaling import RopeScaling, RopeScalingType

PHI_4_MINI: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "bos_token_id": 199_999,
    "embd_pdrop": 0.0,
    "eos_token_id": 199_999,
    "full_attn_mod": 1,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "max_position_embeddings": 131_072,
    "mlp_bias": False,
    "model_type": "phi3",
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 199_999,
    "partial_rotary_factor": 0.75,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "rope_theta": 10000.0,
    "sliding_window": 262_144,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 200_064,
}
"""Every key of that model's file, its factors replaced by round ones."""


def read(config: dict[str, Any]) -> tuple[TransformerConfig, tuple[str, ...]]:
    values, notes = metadata_from_config(config, where=Path("config.json"))
    model = TransformerConfig.from_metadata(
        values, family=Family.PHI3, where="config.json", tie_word_embeddings=True
    )
    return model, notes


def test_a_published_phi_4_mini_is_read_key_by_key() -> None:
    model, notes = read(PHI_4_MINI)
    assert (model.head_dim, model.rotary_dim, model.parameter_count()) == (128, 96, 3_836_021_760)
    assert model.rope_scaling is not None
    assert model.rope_scaling.rotation_factor == pytest.approx(
        math.sqrt(1 + math.log(32) / math.log(4096)), rel=1e-12
    )
    assert model.turning_length == 4096
    assert any("auto_map is left out" in note for note in notes)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"full_attn_mod": 2}, "full_attn_mod is 2"),
        ({"interpolate_factor": 4}, "interpolate_factor is 4"),
        ({"lm_head_bias": True}, "lm_head_bias is True"),
        ({"partial_rotary_factor": 0.3}, "short_factor is '48 numbers'.*19 numbers"),
        ({"partial_rotary_factor": 1.5, "rope_scaling": None}, "partial_rotary_factor is 1.5.*at most 1"),
        ({"rope_scaling": PHI_4_MINI["rope_scaling"] | {"short_factor": [1.0] * 47}}, "'47 numbers'.*48"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'.*longrope for the phi3"),
    ],
)
def test_what_no_phi_computes_is_refused_by_its_key(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ArchitectureRefused, match=what):
        read(PHI_4_MINI | changes)


def test_an_export_states_longrope_as_older_releases_of_transformers_read_it(tmp_path: Path) -> None:
    import_model(hf_folder(tmp_path / "in", odd_config("phi3", 0)), tmp_path / "x.apr")
    export_huggingface(tmp_path / "x.apr", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}
    assert (config["original_max_position_embeddings"], config["partial_rotary_factor"]) == (16, 0.75)


def written(family: str, tmp_path: Path) -> gguf.GGUFReader:
    """The GGUF file of a family's first odd model."""
    import_model(hf_folder(tmp_path / "in", odd_config(family, 0)), tmp_path / "x.apr")
    export_gguf(tmp_path / "x.apr", tmp_path / "x.gguf", kind=GgufType.F32)
    return gguf.GGUFReader(tmp_path / "x.gguf")


def test_a_phi_in_gguf_states_what_the_converter_states(tmp_path: Path) -> None:
    reader = written("phi3", tmp_path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["phi3.rope.dimension_count"] == 6
    assert fields["phi3.rope.scaling.original_context_length"] == 16
    factor = math.sqrt(1 + math.log(64 / 16) / math.log(16))
    assert fields["phi3.rope.scaling.attn_factor"] == pytest.approx(factor)
    assert fields["phi3.attention.sliding_window"] == 70
    assert "phi3.rope.scaling.type" not in fields
    tensors = {one.name: one for one in reader.tensors}
    stated = odd_config("phi3", 0)["rope_scaling"]
    for name, key in (("long", "long_factor"), ("short", "short_factor")):
        np.testing.assert_array_equal(
            tensors[f"rope_factors_{name}.weight"].data, np.array(stated[key], np.float32)
        )
    assert tensors["blk.0.attn_qkv.weight"].shape.tolist() == [32, 64]
    assert tensors["blk.0.ffn_up.weight"].shape.tolist() == [32, 80]


def test_a_window_of_zero_tells_llama_cpp_that_a_phi_has_none(tmp_path: Path) -> None:
    import_model(hf_folder(tmp_path / "in", odd_config("phi3", 2)), tmp_path / "x.apr")
    export_gguf(tmp_path / "x.apr", tmp_path / "x.gguf", kind=GgufType.F32)
    assert gguf.GGUFReader(tmp_path / "x.gguf").fields["phi3.attention.sliding_window"].contents() == 0
    import_model(tmp_path / "x.gguf", tmp_path / "y.apr")
    np.testing.assert_allclose(logits_of(tmp_path / "y.apr"), logits_of(tmp_path / "x.apr"), atol=1e-5)


def test_ministral_and_olmo_state_the_keys_of_their_architectures(tmp_path: Path) -> None:
    fields = written("ministral3", tmp_path / "one").fields
    assert fields["mistral3.attention.temperature_scale"].contents() == pytest.approx(0.3)
    assert fields["mistral3.rope.scaling.yarn_log_multiplier"].contents() == 1.0
    assert "mistral3.rope.scaling.attn_factor" not in fields
    fields = written("olmo3", tmp_path / "other").fields
    assert fields["general.architecture"].contents() == "olmo2"
    pattern = fields["olmo2.attention.sliding_window_pattern"].contents()
    assert pattern == [True, True, True, False, True]


def test_one_of_longropes_two_tensors_alone_is_refused(tmp_path: Path) -> None:
    written("phi3", tmp_path)
    content = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "y.gguf").write_bytes(
        content.replace(b"rope_factors_short.weight", b"rope_factors_shirt.weight")
    )
    with pytest.raises(DamagedModelFile, match=r"rope_factors_short\.weight is missing"):
        import_model(tmp_path / "y.gguf", tmp_path / "y.apr")


def test_text_that_crosses_longropes_length_is_what_the_whole_network_says() -> None:
    scaling = RopeScaling(
        rope_type=RopeScalingType.LONGROPE,
        factor=4.0,
        original_max_position_embeddings=12,
        short_factor=(1.0, 1.1, 1.2, 1.3),
        long_factor=(2.0, 5.0, 9.0, 20.0),
    )
    model = tiny_decoder(tiny_config(rope_scaling=scaling), seed=4)
    text = random_tokens(model.config, (7,)).tolist()
    found = generate(model, text, Sampling(max_new_tokens=20))
    for token in found:
        logits = model(random_tokens(model.config, (1, 1)).new_tensor([text]))
        assert token == int(logits[0, -1].argmax())
        text.append(token)


def test_dynamic_scaling_stretches_rows_and_not_generated_text() -> None:
    scaling = RopeScaling(rope_type=RopeScalingType.DYNAMIC, factor=2.5)
    model = tiny_decoder(tiny_config(rope_scaling=scaling))
    assert model.config.longest_sequence == 160
    preflight._positions(model.config, 160)
    with pytest.raises(UsageError, match="161 is more than the model's 160 positions"):
        preflight._positions(model.config, 161)
    with pytest.raises(UsageError, match="max_position_embeddings"):
        generate(model, [1] * 60, Sampling(max_new_tokens=5))
