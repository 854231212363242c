"""Every key of a model's configuration is read as the reference reads it, or refused by its name."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders.files import write_apr
from builders.hf_models import SIZES, claims, hf_folder, imported_logits, logits_of, reference_logits
from safetensors.torch import save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from apr_dist.apr.reader import AprReader
from apr_dist.errors import ArchitectureRefused
from apr_dist.interop.hf_config import metadata_from_config
from apr_dist.interop.hf_export import export_huggingface
from apr_dist.interop.importing import import_model
from apr_dist.model.families import HF_KEYS, Family

CONFIGURATIONS = int(os.environ.get("APR_DIST_CONFIGURATIONS", "25"))
"""Random configurations of each family; ``make families`` tries a thousand."""

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
ROPES: list[dict[str, Any] | None] = [
    None,
    {},
    {"rope_type": "default"},
    {"rope_type": "default", "rope_theta": 321.0},
    {"type": "linear", "factor": 2.0},
    {"rope_type": "linear", "factor": 3, "rope_theta": 77.0},
    {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
    {"rope_type": "dynamic", "factor": 2.0},
    LLAMA3,
    LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 1.0},
    {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"},
    YARN,
    YARN | {"beta_fast": 16, "beta_slow": 2.0, "attention_factor": 1.5},
    YARN | {"beta_fast": None, "beta_slow": 0},
    YARN | {"mscale": 0.7, "mscale_all_dim": 0.3},
    YARN | {"mscale": 1.3},
    YARN | {"truncate": False},
    YARN | {"truncate": None, "rope_theta": 500.0},
    YARN | {"factor": None},
    {"rope_type": "yarn", "factor": 2.0},
    YARN | {"extrapolation_factor": 1.0},
    {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    {"type": "su", "short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [2.0, 3.0, 4.0, 9.0]},
    {"rope_type": "longrope", "short_factor": [1.0] * 2, "long_factor": [3.0] * 2}
    | {"partial_rotary_factor": 0.5, "attention_factor": 1.2},
    YARN | {"llama_4_scaling_beta": 0.4, "max_position_embeddings": 9},
    {"full_attention": {"rope_type": "default", "rope_theta": 10.0}},
    {"full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding_attention": {"rope_type": "default"}},
    {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 20.0}},
    {"sliding_attention": {"rope_type": "linear", "factor": 2.0}},
]
FULL, SLIDING = "full_attention", "sliding_attention"
CHOICES: dict[str, list[Any]] = {
    "hidden_act": ["silu", "swish", "gelu", "relu", "gelu_pytorch_tanh"],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "head_dim": [None, 8, 16],
    "num_key_value_heads": [None, 1, 2, 4],
    "rope_theta": [100.0, 10_000, 5e5],
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
    "original_max_position_embeddings": [8, 32],
    "partial_rotary_factor": [0.5, 1.0],
    "sliding_window": [None, 4, 100],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 1, 2],
    "layer_types": [[FULL, FULL], [SLIDING, SLIDING], [FULL, SLIDING], [SLIDING], None],
    "tie_word_embeddings": [True, False],
    "rms_norm_eps": [1e-6, 1e-2, 0.3],
    "max_position_embeddings": [16, 32, 64],
    "attention_dropout": [0.0, 0.3],
    "pretraining_tp": [1, 2],
    "is_causal": [True, False],
    "initializer_range": [0.02, 0.5],
    "pad_token_id": [None, 3],
    "eos_token_id": [None, 2, [2, 3]],
    "chunk_size_feed_forward": [0, 8],
    "rope_interleaved": [True, False],
    "use_cache": [True, False],
    "temperature": [0.5],
    "logit_scale": [0.5],
    "attention_multiplier": [0.1],
    "no_rope_layers": [[0, 1]],
    "hidden_activation": ["gelu_pytorch_tanh", "gelu", "silu"],
    "query_pre_attn_scalar": [4, 16, 100],
    "attn_logit_softcapping": [None, 0.5, 20.0],
    "final_logit_softcapping": [None, 0.5, 20.0],
    "sliding_window_pattern": [1, 2, 3],
    "rope_local_base_freq": [50.0, 10_000],
    "use_bidirectional_attention": [None, False, True],
    "use_qk_norm": [True, False],
    "torch_dtype": ["float32", "bfloat16"],
    "_name_or_path": ["somewhere"],
}


def drawn(family: Family, number: int) -> dict[str, Any]:
    """A configuration of the family: tiny sizes, some of them left out, and some other keys."""
    choose = random.Random(f"{family}:{number}")
    config = {key: value for key, value in SIZES.items() if key != "head_dim" or choose.random() < 0.5}
    for key in ("tie_word_embeddings", "max_position_embeddings", "num_key_value_heads"):
        if choose.random() < 0.2:
            del config[key]
    for key in choose.sample(sorted(CHOICES), choose.randint(0, 4)):
        config[key] = choose.choice(CHOICES[key])
    return claims(family) | config


@pytest.mark.parametrize("family", Family)
def test_a_random_configuration_gives_equal_logits_or_is_refused_by_its_key(
    family: Family, tmp_path: Path
) -> None:
    outcomes = [outcome(drawn(family, number), tmp_path / str(number)) for number in range(CONFIGURATIONS)]
    assert outcomes.count("equal") > 0
    assert outcomes.count("refused") > 0


def stated(config: dict[str, Any]) -> list[str]:
    """Keys, those inside of objects too, besides the sizes that every configuration has."""
    inner = [key for value in config.values() if isinstance(value, dict) for key in value]
    return [key for key in (*config, *inner) if key not in SIZES or key in CHOICES]


def outcome(config: dict[str, Any], folder: Path) -> str:
    """What came of a configuration; that it was read wrongly is an error."""
    transformers.logging.set_verbosity_error()
    try:
        expected = reference_logits(hf_folder(folder, config))
    except Exception:
        return "no reference"
    refusal = found = None
    try:
        found = imported_logits(folder, folder / "model.apr")
    except ArchitectureRefused as error:
        refusal = error.what
    for file in folder.glob("model.*"):
        file.unlink()
    if found is None:
        assert any(key in str(refusal) for key in stated(config)), (config, refusal)
        return "refused"
    assert torch.allclose(found, expected, atol=2e-4, rtol=1e-4), (config, (found - expected).abs().max())
    return "equal"


def default_config(model_type: str) -> dict[str, Any]:
    """The library's own configuration of that type, without the infinities that some have."""
    try:
        text = json.dumps(CONFIG_MAPPING[model_type]().to_dict(), default=str)
    except Exception:
        return {}  # its parts have no defaults that fit together
    return json.loads(text, parse_constant=lambda _: 0.0)  # type: ignore[no-any-return]


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-005")
@pytest.mark.parametrize("model_type", sorted({*CONFIG_MAPPING} & {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}))
def test_every_causal_model_of_the_library_is_one_of_ours_or_refused_by_name(
    model_type: str, tmp_path: Path
) -> None:
    """Its own configuration, beside tensors that are named like Llama's."""
    listed = [family for family in Family if family.hf_model_type == model_type]
    if listed:
        folder = hf_folder(tmp_path / "in", claims(listed[0]) | SIZES)
        torch.testing.assert_close(
            imported_logits(folder, tmp_path / "x.apr"), reference_logits(folder), atol=2e-4, rtol=1e-4
        )
        return
    llama = hf_folder(tmp_path / "in", claims(Family.LLAMA) | SIZES)
    config = default_config(model_type) | SIZES | {"model_type": model_type}
    for classes in ([MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]], ["LlamaForCausalLM"], None):
        (llama / "config.json").write_text(json.dumps(config | {"architectures": classes}, default=str))
        with pytest.raises(ArchitectureRefused, match=model_type):
            import_model(llama, tmp_path / "x.apr")
    assert not (tmp_path / "x.apr").exists()


@pytest.mark.parametrize("family", Family)
def test_the_default_of_an_absent_key_is_that_of_the_library(family: Family) -> None:
    theirs = CONFIG_MAPPING[family.hf_model_type]()
    for key, value in family.definition.hf_defaults.items():
        if key in ("rope_theta", "rope_local_base_freq"):
            kind = "full_attention" if key == "rope_theta" else "sliding_attention"
            rope = theirs.rope_parameters
            theta = family.definition.rope_default.get("rope_theta", value)
            assert rope.get(kind, rope)["rope_theta"] == theta
        elif value is not None:
            assert getattr(theirs, key) == value, key
    values, notes = metadata_from_config(claims(family), where=Path("config.json"))
    assert values["num_kv_heads"] == theirs.num_key_value_heads
    assert values["head_dim"] == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert f"rms_norm_eps {theirs.rms_norm_eps:g}" in notes[0]


@pytest.mark.parametrize("family", Family)
def test_every_key_that_the_library_writes_for_a_family_is_listed(family: Family) -> None:
    keys = {**HF_KEYS, **family.definition.hf_keys}
    written = json.loads(CONFIG_MAPPING[family.hf_model_type]().to_json_string(use_diff=False))
    assert [key for key in written if key not in keys and not key.startswith("_")] == []


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-005")
@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        (Family.LLAMA, "hidden_act", "gelu"),
        (Family.QWEN2, "hidden_act", "relu"),
        (Family.MISTRAL, "layer_types", [FULL, SLIDING]),
        (Family.MISTRAL, "layer_types", [FULL, FULL]),
        (Family.QWEN3, "layer_types", [SLIDING, FULL]),
        (Family.LLAMA, "mlp_bias", True),
        (Family.MISTRAL, "attention_bias", True),
        (Family.LLAMA, "sliding_window", 8),
        (Family.QWEN2, "use_sliding_window", True),
        (Family.LLAMA, "attention_logit_cap", 30.0),
        (Family.LLAMA, "embedding_multiplier", 12),
    ],
)
def test_what_changes_logits_and_is_not_computed_is_refused_by_name_and_value(
    family: Family, key: str, value: object, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps(claims(family) | SIZES | {key: value}))
    save_file({"w": torch.ones(2)}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ArchitectureRefused, match=key) as refusal:
        import_model(tmp_path / "in", tmp_path / "x.apr")
    assert refusal.value.remedy
    assert not (tmp_path / "x.apr").exists()


def test_a_classifier_of_one_of_our_families_is_refused_by_its_class(tmp_path: Path) -> None:
    config = claims(Family.LLAMA) | SIZES | {"architectures": ["LlamaForSequenceClassification"]}
    with pytest.raises(ArchitectureRefused, match="LlamaForSequenceClassification"):
        metadata_from_config(config, where=tmp_path)


def test_what_is_left_out_is_said_and_quantisation_is_not_exported(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "in", claims(Family.LLAMA) | SIZES)
    config = json.loads((folder / "config.json").read_text())
    config |= {"attention_dropout": 0.3, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    summary = import_model(folder, tmp_path / "x.apr")
    assert any("attention_dropout is left out" in note for note in summary.notes)
    assert any("quantization_config is left out" in note for note in summary.notes)
    export_huggingface(tmp_path / "x.apr", tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    torch.testing.assert_close(reference_logits(tmp_path / "out"), logits_of(tmp_path / "x.apr"))


def test_a_file_that_kept_other_keys_exports_those_that_are_known(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "in", claims(Family.LLAMA) | SIZES)
    import_model(folder, tmp_path / "x.apr")
    with AprReader(tmp_path / "x.apr") as reader:
        kept = dict(reader.metadata.custom["apr_dist.hf_config"])
        kept |= {"quantization_config": {"bits": 4}, "embedding_multiplier": 3.0, "use_cache": False}
        metadata = reader.metadata.with_custom({"apr_dist.hf_config": kept}).to_mapping()
        tensors = {name: reader.float32(name) for name in reader.tensors}
        write_apr(tmp_path / "y.apr", tensors, metadata)
    export_huggingface(tmp_path / "y.apr", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["use_cache"] is False
    assert not {"quantization_config", "embedding_multiplier"} & config.keys()
    torch.testing.assert_close(reference_logits(tmp_path / "out"), logits_of(tmp_path / "y.apr"))


def test_an_export_that_would_be_read_as_another_model_is_refused(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "in", claims(Family.LLAMA) | SIZES)
    import_model(folder, tmp_path / "x.apr")
    with AprReader(tmp_path / "x.apr") as reader:
        kept = dict(reader.metadata.custom["apr_dist.hf_config"]) | {"hidden_act": "gelu"}
        metadata = reader.metadata.with_custom({"apr_dist.hf_config": kept}).to_mapping()
        write_apr(tmp_path / "y.apr", {name: reader.float32(name) for name in reader.tensors}, metadata)
    with pytest.raises(ArchitectureRefused, match="hidden_act is 'gelu'"):
        export_huggingface(tmp_path / "y.apr", tmp_path / "out")
    assert not (tmp_path / "out").exists()
