"""Sources as other programs leave them: read as ``transformers`` reads them, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from builders.files import assemble, write_apr
from builders.hf_models import SIZES, claims, hf_folder, logits_of, reference_logits
from safetensors.torch import load_file, save_file

from apr_dist.apr.layout import DType
from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.cli import main
from apr_dist.errors import ExitCode
from apr_dist.interop.importing import import_model
from apr_dist.model.families import Family

Tensors = dict[str, torch.Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Rows = npt.NDArray[np.float32]
LLAMA = claims(Family.LLAMA) | SIZES | {"rope_theta": 1e4}


def change_weights(folder: Path, change: Callable[[Tensors], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, {"format": "pt"})


def imported(folder: Path, target: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """Standard output of an import that succeeds."""
    capfd.readouterr()
    assert main(["import", str(folder), "-o", str(target)]) == 0, capfd.readouterr().err
    return capfd.readouterr().out


def same_logits(folder: Path, target: Path) -> None:
    torch.testing.assert_close(logits_of(target), reference_logits(folder), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
        HEAD,
        EMBEDDING,
    ],
)
def test_a_folder_without_a_tensor_is_refused_and_the_tensor_named(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = hf_folder(tmp_path / "in", LLAMA)
    change_weights(folder, lambda tensors: tensors.pop(name))
    assert main(["import", str(folder), "-o", str(tmp_path / "x.apr")]) == ExitCode.GATE
    assert name in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_of_a_single_file_and_stale_shards_the_one_that_transformers_loads_is_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = hf_folder(tmp_path / "in", LLAMA)
    old = hf_folder(tmp_path / "old", LLAMA, seed=7)
    shard = "model-00001-of-00001.safetensors"
    shutil.copy(old / "model.safetensors", folder / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(folder / shard), shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json beside it was not" in imported(folder, tmp_path / "x.apr", capfd)
    same_logits(folder, tmp_path / "x.apr")
    assert not torch.allclose(logits_of(tmp_path / "x.apr"), reference_logits(old), atol=1e-2)


def with_frequencies(theta: float, dtype: torch.dtype) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        for layer in range(2):
            values = theta ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = values.to(dtype)

    return change


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rotary_buffers_are_left_out_with_a_note_when_they_can_be_computed_again(
    dtype: torch.dtype, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = hf_folder(tmp_path / "in", LLAMA)
    change_weights(folder, with_frequencies(1e4, dtype))
    assert "2 rotary_emb.inv_freq buffers were left out" in imported(folder, tmp_path / "x.apr", capfd)
    assert main(["validate", str(tmp_path / "x.apr")]) == 0
    same_logits(folder, tmp_path / "x.apr")


def test_rotary_buffers_of_other_frequencies_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = hf_folder(tmp_path / "in", LLAMA)
    change_weights(folder, with_frequencies(5e5, torch.float32))
    assert main(["import", str(folder), "-o", str(tmp_path / "x.apr")]) == ExitCode.GATE
    assert "inv_freq holds other frequencies than rope_theta 10000 gives" in capfd.readouterr().err


PREFIXES: dict[str, Callable[[str], str]] = {
    "module.": lambda name: f"module.{name}",
    "base_model.model.": lambda name: f"base_model.model.{name}",
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "a compiled block": lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    "sharded blocks": lambda name: name.replace("model.layers.", "model._fsdp_wrapped_module.layers."),
    "checkpointed": lambda name: name.replace("mlp.", "_checkpoint_wrapped_module.mlp."),
    "a module of a trainer": lambda name: f"model.{name}",
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("tied", [True, False])
def test_prefixes_of_the_program_that_saved_are_removed_with_a_note(
    prefix: str, tied: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = hf_folder(tmp_path / "plain", LLAMA | {"tie_word_embeddings": tied})
    folder = tmp_path / "in"
    shutil.copytree(plain, folder)
    change_weights(folder, lambda t: [t.update({PREFIXES[prefix](name): t.pop(name)}) for name in list(t)])
    assert "tensor names lost a prefix" in imported(folder, tmp_path / "x.apr", capfd)
    same_logits(plain, tmp_path / "x.apr")


@pytest.mark.parametrize("flags", [(), ("--tie",)])
def test_a_shared_matrix_that_is_stored_as_the_head_alone_is_the_embedding(
    flags: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = hf_folder(tmp_path / "in", LLAMA | {"tie_word_embeddings": True})
    change_weights(folder, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    target = tmp_path / "x.apr"
    assert main(["import", str(folder), "-o", str(target), *flags]) == 0
    assert "only copy of the matrix" in capfd.readouterr().out
    same_logits(folder, target)


def test_a_head_that_is_neither_stored_nor_said_to_be_tied_is_not_taken_from_the_embedding(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = hf_folder(tmp_path / "in", LLAMA)
    change_weights(folder, lambda tensors: tensors.pop(HEAD))
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]  # false in transformers' LlamaConfig
    (folder / "config.json").write_text(json.dumps(config))
    target = tmp_path / "x.apr"
    assert main(["import", str(folder), "-o", str(target)]) == ExitCode.GATE
    assert "or import it with --tie" in capfd.readouterr().err
    assert main(["import", str(folder), "-o", str(target), "--tie"]) == 0
    assert main(["validate", str(target)]) == 0


def adjacent(rows: Rows, heads: int) -> Rows:
    """The permutation of llama.cpp's converter for the llama architecture, as its source has it."""
    return (
        rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [(), ("--dtype", "f32")])
def test_rows_in_adjacent_pairs_become_split_halves_with_the_same_logits(
    bias: bool, dtype: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = hf_folder(tmp_path / "in", LLAMA | {"attention_bias": bias})
    import_model(folder, tmp_path / "ours.apr")
    with AprReader(tmp_path / "ours.apr") as reader:
        arrays = {name: reader.float32(name).copy() for name in reader.tensors}
        metadata = reader.metadata.to_mapping() | {"rope_type": 0}
    for name, rows in arrays.items():
        if "q_proj" in name or "k_proj" in name:
            arrays[name] = adjacent(rows, 4 if "q_proj" in name else 2)
    write_apr(tmp_path / "theirs.apr", arrays, metadata)
    assert main(["validate", str(tmp_path / "theirs.apr")]) == ExitCode.GATE
    advised = capfd.readouterr().err.split("Fix: ")[1].split()[:5]
    assert advised[:2] == ["apr-dist", "import"]
    assert main([*advised[1:4], str(tmp_path / "x.apr"), *dtype]) == 0
    assert "from adjacent pairs to split halves" in capfd.readouterr().out
    same_logits(folder, tmp_path / "x.apr")


def with_placeholder(
    path: Path, target: Path, *, offset: int = 0, shape: tuple[int, ...] | None = None
) -> Path:
    """The file of a tied model as another writer leaves it: the head in the index, with no byte."""
    with AprReader(path) as reader:
        metadata, data = AprMetadata.dump(reader.metadata), b""
        entries = []
        for name, entry in {**reader.tensors, HEAD: reader.tensors[EMBEDDING]}.items():
            payload = b"" if name == HEAD else bytes(reader.raw(name))
            place = (
                (shape or entry.shape, offset, 0) if name == HEAD else (entry.shape, len(data), len(payload))
            )
            entries.append((name.encode(), int(entry.dtype), *place))
            data += payload.ljust(-(-len(payload) // 64) * 64, b"\0")
    target.write_bytes(assemble(sorted(entries), data, metadata=metadata))
    return target


@pytest.mark.parametrize("offset", [0, 64])
@pytest.mark.parametrize("claim", [True, None])
def test_a_tied_head_that_is_listed_without_bytes_is_the_tie_it_is(
    offset: int, claim: bool | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = hf_folder(tmp_path / "in", LLAMA | {"tie_word_embeddings": True})
    import_model(folder, tmp_path / "ours.apr")
    with AprReader(tmp_path / "ours.apr") as reader:
        arrays = {name: reader.float32(name).copy() for name in reader.tensors}
        metadata = {key: v for key, v in reader.metadata.to_mapping().items() if key != "tie_word_embeddings"}
    bare = write_apr(
        tmp_path / "bare.apr", arrays, metadata | ({"tie_word_embeddings": True} if claim else {})
    )
    theirs = with_placeholder(bare, tmp_path / "theirs.apr", offset=offset)
    for command in (
        ["validate", str(theirs)],
        ["inspect", str(theirs)],
        ["stamp", str(theirs), "--license", "MIT", "-o", str(tmp_path / "stamped.apr")],
        ["import", str(theirs), "-o", str(tmp_path / "again.apr")],
        ["export", str(theirs), "--to", "huggingface", "-o", str(tmp_path / "hf")],
        ["export", str(theirs), "--to", "gguf", "-o", str(tmp_path / "x.gguf")],
    ):
        assert main(command) == 0, capfd.readouterr().err
    for path in (theirs, tmp_path / "stamped.apr", tmp_path / "again.apr"):
        same_logits(folder, path)
    assert main(["diff", str(bare), str(theirs)]) == 0


def test_a_head_without_bytes_that_is_no_placeholder_is_a_damaged_tensor(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import_model(hf_folder(tmp_path / "in", LLAMA | {"tie_word_embeddings": True}), tmp_path / "ours.apr")
    other = with_placeholder(tmp_path / "ours.apr", tmp_path / "other.apr", shape=(48, 31))
    assert main(["validate", str(other)]) == ExitCode.MODEL_FILE
    assert "lm_head.weight" in capfd.readouterr().err


def test_llamas_own_attention_bias_is_read_trained_and_written(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "in", LLAMA | {"attention_bias": True})
    import_model(folder, tmp_path / "x.apr", dtype=DType.F32)
    assert main(["validate", str(tmp_path / "x.apr")]) == 0
    same_logits(folder, tmp_path / "x.apr")
    assert main(["export", str(tmp_path / "x.apr"), "--to", "huggingface", "-o", str(tmp_path / "out")]) == 0
    torch.testing.assert_close(
        reference_logits(tmp_path / "out"), reference_logits(folder), atol=1e-6, rtol=0
    )
