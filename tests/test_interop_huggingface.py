"""Hugging Face folders in and out: nothing lost, nothing invented, bad folders refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.files import TINY_METADATA, flipped, small_disk, tiny_tensors, write_apr, write_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from apr_dist.apr.layout import DType, Flag
from apr_dist.apr.reader import AprReader
from apr_dist.errors import (
    AprDistError,
    ArchitectureRefused,
    DamagedModelFile,
    ModelFileMissing,
    NotAModelFile,
    OutputError,
    UnsupportedModelFile,
)
from apr_dist.interop.hf_export import export_huggingface, export_safetensors
from apr_dist.interop.importing import import_model
from apr_dist.interop.tokenizers import tokenizer_json_from_apr

EMBEDDING = "model.embed_tokens.weight"
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "mistral": MistralConfig}


SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "intermediate_size": 96,
}
"""Those of ``tiny_tensors``, as a ``config.json`` states them."""


def saved_model(folder: Path, family: str = "llama", *, tied: bool = True, shard: str = "5GB") -> Any:
    """A tiny random model of ``transformers``, saved by it, with a tokenizer beside it."""
    torch.manual_seed(4)
    special = {"head_dim": 24} if family == "qwen3" else {}
    config = CONFIGS[family](
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        intermediate_size=96,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0},
        tie_word_embeddings=tied,
        **special,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder)
    return model


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def folder_from_tensors(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A folder without ``transformers``: config of the tiny model and one safetensors file."""
    folder.mkdir()
    facts: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}
    facts |= {"tie_word_embeddings": True} | config
    (folder / "config.json").write_text(json.dumps(facts))
    save_file(tensors, folder / "model.safetensors")
    return folder


def torch_tensors(**options: bool) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in tiny_tensors(**options).items()}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_comes_back_byte_for_byte_and_with_the_same_logits(
    tmp_path: Path, family: str, tied: bool
) -> None:
    model = saved_model(tmp_path / "in", family, tied=tied)
    summary = import_model(tmp_path / "in", tmp_path / "x.apr")
    export_huggingface(tmp_path / "x.apr", tmp_path / "out")
    before, after = weights_of(tmp_path / "in"), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in before)
    assert json.loads((tmp_path / "in" / "config.json").read_text()) == json.loads(
        (tmp_path / "out" / "config.json").read_text()
    )
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, atol=1e-5, rtol=0)
    assert summary.tied is tied


def test_every_tokenizer_file_comes_out_as_it_went_in(tmp_path: Path) -> None:
    saved_model(tmp_path / "in")
    (tmp_path / "in" / "chat_template.jinja").write_text("{{ messages }}")
    import_model(tmp_path / "in", tmp_path / "x.apr")
    with AprReader(tmp_path / "x.apr") as reader:
        assert Flag.HAS_VOCAB in reader.header.flags
        assert reader.metadata.chat_template == "{{ messages }}"
        assert reader.metadata.special_tokens == {"bos_token": "<s>", "eos_token": "<e>"}
        assert reader.metadata.custom["tokenizer.eos_token_id"] == 33
    export_huggingface(tmp_path / "x.apr", tmp_path / "out")
    names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"]
    for name in (*names, "tokenizer.model", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes(), name
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("ab<e>", add_special_tokens=False) == [
        0,
        33,
    ]
    content, declared = tokenizer_json_from_apr(tmp_path / "x.apr")
    assert content == (tmp_path / "in" / "tokenizer.json").read_bytes()
    assert declared == {"bos_token": "<s>", "eos_token": "<e>"}


def test_a_file_with_a_bare_tokenizer_still_makes_a_loadable_folder(tmp_path: Path) -> None:
    text = (write_tokenizer(tmp_path / "t") / "tokenizer.json").read_text()
    write_apr(tmp_path / "x.apr", tiny_tensors(), TINY_METADATA | {"tokenizer.json": text})
    export_huggingface(tmp_path / "x.apr", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token, tokenizer.encode("ab", add_special_tokens=False)) == ("<e>", [0])


def test_sharded_weights_are_read_and_written(tmp_path: Path) -> None:
    saved_model(tmp_path / "in", shard="60KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    summary = import_model(tmp_path / "in", tmp_path / "x.apr")
    exported = export_huggingface(tmp_path / "x.apr", tmp_path / "out", max_shard_bytes=60_000)
    assert summary.tensor_count == exported.tensor_count == len(weights_of(tmp_path / "out"))
    assert "model.safetensors.index.json" in exported.files
    assert not AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)[1][
        "missing_keys"
    ]


def test_a_single_file_with_its_config_is_a_model_too(tmp_path: Path) -> None:
    source = folder_from_tensors(tmp_path / "in", torch_tensors())
    import_model(source / "model.safetensors", tmp_path / "x.apr")
    (tmp_path / "out").mkdir()
    exported = export_safetensors(tmp_path / "x.apr", tmp_path / "out" / "one.safetensors")
    assert exported.files == ("one.safetensors", "config.json")
    with safe_open(tmp_path / "out" / "one.safetensors", "pt") as file:
        assert set(file.keys()) == set(tiny_tensors())
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.BF16])
def test_elements_are_rounded_as_torch_rounds_them(tmp_path: Path, kind: torch.dtype, dtype: DType) -> None:
    values = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).to(kind)
    tensors = torch_tensors() | {EMBEDDING: values}
    source = folder_from_tensors(tmp_path / "in", tensors)
    import_model(source, tmp_path / "x.apr", dtype=dtype)
    expected = values.to({DType.F32: torch.float32, DType.F16: torch.float16}.get(dtype, torch.bfloat16))
    with AprReader(tmp_path / "x.apr") as reader:
        np.testing.assert_array_equal(reader.float32(EMBEDDING), expected.float().numpy())
        assert reader.tensors[EMBEDDING].dtype is dtype


def test_what_we_have_no_word_for_survives_a_round_trip_through_a_folder(tmp_path: Path) -> None:
    source = folder_from_tensors(tmp_path / "in", torch_tensors(), attention_dropout=0.25, _my_key={"a": [1]})
    import_model(source, tmp_path / "x.apr")
    export_huggingface(tmp_path / "x.apr", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["attention_dropout"], config["_my_key"]) == (0.25, {"a": [1]})


def test_license_and_data_come_from_the_model_card(tmp_path: Path) -> None:
    source = folder_from_tensors(tmp_path / "in", torch_tensors())
    (source / "README.md").write_text("---\nlicense: mit\ndatasets:\n- one/two\n- three\n---\n# x\n")
    import_model(source, tmp_path / "x.apr")
    metadata = AprReader(tmp_path / "x.apr").metadata
    assert (metadata.license, metadata.data_source) == ("mit", "one/two, three")


def test_the_card_tells_training_and_verdict(tmp_path: Path) -> None:
    facts = {
        "license": "MIT",
        "apr_dist.steps": 1200,
        "apr_dist.val_loss": 2.5,
        "apr_dist.verdict": {"passed": True, "loss_at_step_0": 2.7},
        "apr_dist.files": {"generation_config.json": "{}"},
    }
    write_apr(tmp_path / "x.apr", tiny_tensors(), TINY_METADATA | facts)
    export_huggingface(tmp_path / "x.apr", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\nlicense: MIT\n")
    for row in ("| steps | 1,200 |", "| val_loss | 2.5 |", "| verdict.passed | True |", "| Layers | 2 |"):
        assert row in card
    assert "generation_config" not in card


def test_a_materialised_head_equal_to_the_embedding_is_dropped_with_a_note(tmp_path: Path) -> None:
    tensors = torch_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    source = folder_from_tensors(tmp_path / "in", tensors, tie_word_embeddings=True)
    summary = import_model(source, tmp_path / "x.apr")
    assert summary.tied
    assert "equals the embedding" in summary.notes[0]
    assert "lm_head.weight" not in AprReader(tmp_path / "x.apr").tensors


@pytest.mark.parametrize(
    ("head", "claim", "match"),
    [(True, True, "differs from the emb"), (False, False, r"no lm_head\.weight")],
)
def test_a_tie_that_config_and_tensors_dispute_is_refused(
    tmp_path: Path, head: bool, claim: bool, match: str
) -> None:
    source = folder_from_tensors(tmp_path / "in", torch_tensors(head=head), tie_word_embeddings=claim)
    with pytest.raises(ArchitectureRefused, match=match):
        import_model(source, tmp_path / "x.apr")


def test_a_disputed_tie_is_settled_by_asking_for_it(tmp_path: Path) -> None:
    source = folder_from_tensors(tmp_path / "in", torch_tensors(head=True), tie_word_embeddings=True)
    assert import_model(source, tmp_path / "x.apr", tie=True).tied
    assert not import_model(source, tmp_path / "y.apr", tie=False).tied


def test_folders_without_a_model_are_refused_by_what_they_hold(tmp_path: Path) -> None:
    with pytest.raises(ModelFileMissing):
        import_model(tmp_path / "nowhere", tmp_path / "x.apr")
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises(ModelFileMissing, match="no model here"):
        import_model(folder, tmp_path / "x.apr")
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ModelFileMissing, match=r"pytorch_model\.bin but no safetensors"):
        import_model(folder, tmp_path / "x.apr")
    save_file({"w": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ModelFileMissing, match=r"config\.json"):
        import_model(folder, tmp_path / "x.apr")
    (folder / "config.json").write_text("[1]")
    with pytest.raises(DamagedModelFile, match=r"config\.json"):
        import_model(folder, tmp_path / "x.apr")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "x.bin", 7])
def test_a_shard_index_cannot_point_outside_its_folder(tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(DamagedModelFile, match="weight_map"):
        import_model(folder, tmp_path / "x.apr")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    saved_model(tmp_path / "in", shard="60KB")
    shard = sorted((tmp_path / "in").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelFileMissing, match=shard.name):
        import_model(tmp_path / "in", tmp_path / "x.apr")


def test_a_tensor_type_that_no_apr_file_holds_is_refused_by_name(tmp_path: Path) -> None:
    source = folder_from_tensors(tmp_path / "in", {"ids": torch.ones(2, dtype=torch.int64)})
    with pytest.raises(UnsupportedModelFile, match=r"'ids' has type 'I64'"):
        import_model(source, tmp_path / "x.apr")
    doubles = {name: tensor.double() for name, tensor in torch_tensors().items()}
    double = folder_from_tensors(tmp_path / "double", doubles)
    with pytest.raises(UnsupportedModelFile, match="--dtype"):
        import_model(double, tmp_path / "x.apr")
    assert import_model(double, tmp_path / "x.apr", dtype=DType.F32).dtypes == {"F32": len(doubles)}


def test_a_damaged_safetensors_file_always_ends_in_one_of_our_errors(tmp_path: Path) -> None:
    source = folder_from_tensors(tmp_path / "in", {"a": torch.ones(3, 4), "b": torch.ones(2)})
    path = source / "model.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    refused = 0
    for position in range(header):
        for damaged in (flipped(content, position, 0x11), content[:position]):
            path.write_bytes(damaged)
            try:
                import_model(path, tmp_path / "x.apr", overwrite=True)
            except AprDistError:
                refused += 1
    assert refused > header
    path.write_bytes(content[:-1])
    with pytest.raises(DamagedModelFile, match="truncated"):
        import_model(path, tmp_path / "x.apr", overwrite=True)
    path.write_bytes(b"")
    with pytest.raises(NotAModelFile, match="empty"):
        import_model(path, tmp_path / "x.apr")


def test_an_export_replaces_nothing_unasked_and_leaves_nothing_when_it_fails(tmp_path: Path) -> None:
    source = write_apr(tmp_path / "x.apr", tiny_tensors(), TINY_METADATA)
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        export_huggingface(source, target)
    with pytest.raises(OutputError, match="no model folder"):
        export_huggingface(source, target, overwrite=True)
    export_huggingface(source, tmp_path / "model")
    before = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "x.apr"]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == before
    export_huggingface(source, tmp_path / "model", overwrite=True, dtype=DType.BF16)
    assert weights_of(tmp_path / "model")["model.norm.weight"].dtype is torch.bfloat16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "x.apr"]


def test_an_export_to_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    source = write_apr(tmp_path / "x.apr", tiny_tensors(), TINY_METADATA)
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk, 250_000):  # enough for one export in F16, and for none in F32
        export_huggingface(source, disk / "model", dtype=DType.F16)
        before = {path.name: path.read_bytes() for path in (disk / "model").iterdir()}
        with pytest.raises(OutputError, match="cannot be written"):
            export_huggingface(source, disk / "model", overwrite=True)
        with pytest.raises(OutputError, match="cannot be written"):
            export_huggingface(source, disk / "other")
        assert {path.name: path.read_bytes() for path in (disk / "model").iterdir()} == before
        assert [path.name for path in disk.iterdir()] == ["model"]


def test_an_export_needs_to_know_the_class(tmp_path: Path) -> None:
    source = write_apr(tmp_path / "x.apr", tiny_tensors(), {"architecture": "llama"})
    with pytest.raises(ArchitectureRefused, match="apr-dist stamp"):
        export_huggingface(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
