"""Projections that a family's files hold as one tensor are split on import and joined again on export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from builders.families import odd_config
from builders.files import write_apr
from builders.hf_models import hf_folder, logits_of, reference_logits
from builders.models import tiny_config
from safetensors.numpy import load_file, save_file

from apr_dist.apr.layout import DType
from apr_dist.apr.reader import AprReader
from apr_dist.errors import ArchitectureRefused, UsageError, WeightsRefused
from apr_dist.gates.model_file import prove_model
from apr_dist.interop.gguf_export import GgufType, export_gguf
from apr_dist.interop.hf_export import export_huggingface
from apr_dist.interop.importing import import_model
from apr_dist.model.adapters import chosen_modules
from apr_dist.model.families import Family

QKV, GATE_UP = "model.layers.1.self_attn.qkv_proj.weight", "model.layers.1.mlp.gate_up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return hf_folder(tmp_path / "in", odd_config("phi3", 0))


def changed(folder: Path, **tensors: np.ndarray | None) -> Path:
    """The folder with some tensors put in, or taken out."""
    stored = load_file(folder / "model.safetensors") | {
        name.replace("__", "."): value for name, value in tensors.items()
    }
    save_file(
        {name: value for name, value in stored.items() if value is not None}, folder / "model.safetensors"
    )
    return folder


@pytest.mark.parametrize("dtype", [None, DType.BF16])
def test_a_folder_comes_back_with_the_tensors_that_it_had(
    folder: Path, dtype: DType | None, tmp_path: Path
) -> None:
    import_model(folder, tmp_path / "x.apr", dtype=dtype)
    export_huggingface(tmp_path / "x.apr", tmp_path / "out", dtype=DType.F32)
    before, after = (load_file(one / "model.safetensors") for one in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    bound = 0.0 if dtype is None else 2.0**-8
    for name, values in before.items():
        np.testing.assert_allclose(after[name], values, rtol=bound, err_msg=name)


def test_parts_of_several_types_are_joined_without_loss(folder: Path, tmp_path: Path) -> None:
    import_model(folder, tmp_path / "x.apr")
    with AprReader(tmp_path / "x.apr") as reader:
        tensors = {name: reader.float32(name) for name in reader.tensors}
        tensors["model.layers.1.self_attn.k_proj.weight"] = tensors[
            "model.layers.1.self_attn.k_proj.weight"
        ].astype(np.float16)
        write_apr(tmp_path / "y.apr", tensors, reader.metadata.to_mapping())
    export_huggingface(tmp_path / "y.apr", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")[QKV]
    parts = [tensors[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, np.concatenate([part.astype(np.float32) for part in parts]))


def test_joined_rows_are_quantised_as_they_lie(folder: Path, tmp_path: Path) -> None:
    import_model(folder, tmp_path / "x.apr")
    export_gguf(tmp_path / "x.apr", tmp_path / "x.gguf", kind=GgufType.Q8_0)
    import_model(tmp_path / "x.gguf", tmp_path / "y.apr", dtype=DType.F32)
    with AprReader(tmp_path / "x.apr") as before, AprReader(tmp_path / "y.apr") as after:
        assert before.tensors.keys() == after.tensors.keys()
        for name in before.tensors:
            largest = float(np.abs(before.float32(name)).max())
            assert np.abs(before.float32(name) - after.float32(name)).max() <= largest / 200, name


def test_parts_that_are_stored_apart_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    rows = load_file(folder / "model.safetensors")[QKV]
    changed(folder, **{QKV: None} | {"model.layers.1.self_attn.q_proj.weight": rows[:32]})
    with pytest.raises(WeightsRefused, match=r"q_proj\.weight is stored apart, and phi3 models hold it in"):
        import_model(folder, tmp_path / "x.apr")


@pytest.mark.parametrize("name", [QKV, GATE_UP])
def test_a_joined_tensor_of_other_rows_is_refused_with_what_was_expected(
    folder: Path, name: str, tmp_path: Path
) -> None:
    changed(folder, **{name: load_file(folder / "model.safetensors")[name][:-1]})
    with pytest.raises(WeightsRefused, match=name) as refusal:
        import_model(folder, tmp_path / "x.apr")
    assert "rows: those of" in refusal.value.expected


def test_a_lost_joined_tensor_is_missed_by_its_parts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsRefused, match="gate_proj"):
        import_model(changed(folder, **{GATE_UP: None}), tmp_path / "x.apr")


def test_joined_names_under_another_familys_claim_are_refused(folder: Path, tmp_path: Path) -> None:
    config = odd_config("llama", 0) | {"vocab_size": 53}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArchitectureRefused, match="LlamaForCausalLM"):
        import_model(folder, tmp_path / "x.apr")


def test_an_adapter_of_a_joined_projection_is_refused_with_the_targets_there_are() -> None:
    model = tiny_config(Family.PHI3)
    with pytest.raises(UsageError, match=r"q_proj is a part of self_attn\.qkv_proj") as refusal:
        chosen_modules(model, ["all-linear"])
    assert "--adapter.targets o_proj,down_proj" in refusal.value.remedy
    assert len(chosen_modules(model, ["o_proj", "down_proj"])) == 2 * model.num_layers


def test_an_apr_file_of_joined_tensors_is_refused_until_an_import_has_split_it(
    folder: Path, tmp_path: Path
) -> None:
    import_model(folder, tmp_path / "x.apr")
    with AprReader(tmp_path / "x.apr") as reader:
        metadata = reader.metadata.to_mapping()
    write_apr(tmp_path / "joined.apr", load_file(folder / "model.safetensors"), metadata)
    with (
        AprReader(tmp_path / "joined.apr") as reader,
        pytest.raises(ArchitectureRefused, match="q_proj, k_proj, v_proj as one tensor") as refusal,
    ):
        prove_model(reader)
    assert refusal.value.remedy == f"apr-dist import {tmp_path / 'joined.apr'} -o split.apr"
    import_model(tmp_path / "joined.apr", tmp_path / "split.apr")
    assert (logits_of(tmp_path / "split.apr") - reference_logits(folder)).abs().max() < 1e-5
