"""Promises of the contracts that no other part's suite shows: arrival, values, read-back, dispatch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from builders.files import write_apr
from builders.models import random_tokens, tiny_config, tiny_decoder
from builders.runs import run_here

from apr_dist import cli
from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.apr.writer import AprWriter
from apr_dist.config import TrainConfig
from apr_dist.config.reading import parse_command_line
from apr_dist.errors import ExitCode, UsageError, WeightsRefused
from apr_dist.gates.losses import final_gates
from apr_dist.gates.preflight import run_preflight
from apr_dist.gates.weights import check_values
from apr_dist.model.config import preset
from apr_dist.model.families import Family
from apr_dist.model.transformer import Decoder, init_weights
from apr_dist.parallel import gather
from apr_dist.parallel import runtime as processes
from apr_dist.parallel.runtime import Runtime, reset_state
from apr_dist.parallel.save_group import Exchange
from apr_dist.parallel.weights import load_weights, prove_weights, weight_digests

if TYPE_CHECKING:
    from builders.runs import Inputs


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    reset_state()
    yield processes.start(device="cpu", strategy="single", precision="f32", cpu_threads=1, timeout_s=60)
    reset_state()


def save(model: Decoder, path: Path, runtime: Runtime) -> None:
    parts, metadata = gather.weight_parts(model, runtime), AprMetadata.from_mapping({})
    gather.save_weights(parts, path, metadata, overwrite=True, exchange=Exchange(runtime))


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-001")
def test_one_value_that_did_not_arrive_stops_the_run_and_is_named(runtime: Runtime, tmp_path: Path) -> None:
    config = tiny_config(Family.QWEN2)
    source, model = tiny_decoder(config, seed=1), tiny_decoder(config, seed=2)
    save(source, tmp_path / "m.apr", runtime)
    with AprReader(tmp_path / "m.apr") as reader:
        digests = load_weights(model, reader, runtime)
    assert digests == weight_digests(source, runtime) == weight_digests(model, runtime)
    name = "model.layers.1.self_attn.q_proj.bias"
    with torch.no_grad():
        model.get_parameter(name)[0] += 1e-3
    with pytest.raises(WeightsRefused, match=rf"TRAINER-001.*{name}"):
        prove_weights(model, digests, runtime)
    with pytest.raises(WeightsRefused, match="TRAINER-001"):
        prove_weights(source, {**digests, "one.more": "0"}, runtime)


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-007")
@pytest.mark.parametrize(
    ("name", "value", "good"),
    [
        ("a.weight", math.nan, False),
        ("a.weight", math.inf, False),
        ("a.weight", -math.inf, False),
        ("a.weight", 0.0, False),
        ("a.bias", 0.0, True),
        ("a.bias", math.nan, False),
        ("a.weight", 3e38, True),
    ],
)
def test_values_that_training_cannot_have_left_are_refused(
    tmp_path: Path, name: str, value: float, good: bool
) -> None:
    other = {"b.weight": np.ones((2, 2), np.float32)}
    path = write_apr(tmp_path / "m.apr", {name: np.full((64, 3), value, np.float32), **other})
    with AprReader(path) as reader:
        if good:
            assert check_values(reader, [name, "b.weight"]) == 64 * 3 + 4
            return
        with pytest.raises(WeightsRefused, match=rf"TRAINER-007.*{name}"):
            check_values(reader, [name, "b.weight"])


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-007")
def test_of_several_bad_tensors_the_first_is_named(tmp_path: Path) -> None:
    sizes = {"a.weight": 4, "c.weight": 1 << 20, "b.weight": 2, "d.weight": 1}
    values = {name: np.full((rows, 2), np.nan, np.float32) for name, rows in sizes.items()}
    values["a.weight"] = np.ones((4, 2), np.float32)
    with AprReader(write_apr(tmp_path / "m.apr", values)) as reader:
        for _ in range(5):  # however the threads take turns
            with pytest.raises(WeightsRefused, match=r"c\.weight holds 2097152 values"):
                check_values(reader, list(sizes))


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-010")
@pytest.mark.parametrize(("last", "fell"), [(2.4, True), (2.5, False), (2.6, False)])
def test_whether_the_loss_fell_is_said_and_stops_nothing(last: float, fell: bool) -> None:
    gates = final_gates(first_val_loss=2.5, val_loss=last, target=2.2, finetune=True, steps=10)
    said = next(gate for gate in gates if gate.id == "FALSIFY-APR-DIST-TRAINER-010")
    assert (said.passed, said.ship_blocking) == (fell, False)
    assert said.measured == f"{last - 2.5:+.4f}"


class AlteringWriter(AprWriter):
    """A disk that changes one value of one tensor and says nothing."""

    def append(self, name: str, piece: np.ndarray[Any, Any]) -> None:
        changed = np.array(piece)
        if name == "model.norm.weight":
            changed[0] += 1
        super().append(name, changed)


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-002")
def test_a_checkpoint_that_does_not_read_back_is_an_error(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_decoder()
    save(model, tmp_path / "good.apr", runtime)
    monkeypatch.setattr(gather, "AprWriter", AlteringWriter)
    with pytest.raises(WeightsRefused, match=r"CHECKPOINT-002.*model\.norm\.weight"):
        save(model, tmp_path / "bad.apr", runtime)


class StoppingWriter(AprWriter):
    """A disk that fills up after the first tensor."""

    def append(self, name: str, piece: np.ndarray[Any, Any]) -> None:
        super().append(name, piece)
        raise OSError(28, "No space left on device")


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-010")
def test_a_write_that_fails_half_way_leaves_the_checkpoint_before_it(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tiny_decoder(seed=1), tmp_path / "checkpoint.apr", runtime)
    before = (tmp_path / "checkpoint.apr").read_bytes()
    monkeypatch.setattr(gather, "AprWriter", StoppingWriter)
    with pytest.raises(OSError, match="No space"):
        save(tiny_decoder(seed=2), tmp_path / "checkpoint.apr", runtime)
    assert (tmp_path / "checkpoint.apr").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.apr"]


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-002")
def test_without_an_init_the_model_is_llama_370m_field_for_field() -> None:
    config = preset(TrainConfig().model)
    assert config.family is Family.LLAMA
    published = {
        "hidden_size": 1024, "num_layers": 24, "num_heads": 16, "num_kv_heads": 4, "head_dim": 64,
        "intermediate_size": 2816, "vocab_size": 50_257, "max_position_embeddings": 4096,
        "rope_theta": 1e4, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in published} == published
    assert not config.qkv_bias


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-CUDA-001")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", Family)
def test_one_builder_serves_every_device(family: Family, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    config = tiny_config(family)
    plain = Decoder(config)
    with torch.device("meta"):
        built = Decoder(config)
    built.to_empty(device=device)
    built.reset_buffers()
    for model in (plain, built):
        init_weights(model, seed=4)
    shapes = {name: tuple(weight.shape) for name, weight in built.named_parameters()}
    assert shapes == config.parameter_shapes()
    tokens = random_tokens(config, (2, 9))
    with torch.no_grad():
        found, expected = built(tokens.to(device)).cpu(), plain(tokens)
    assert torch.allclose(found, expected, atol=1e-5)


def preflight_of(inputs: Inputs, run_dir: Path, *flags: str) -> tuple[object, bool]:
    given = [*inputs.data_flags(), "--run-dir", str(run_dir), *flags]
    found = run_preflight(parse_command_line(given).config.resolved(), world_size=1, say=lambda _: None)
    try:
        return found.model_config, found.reader is not None
    finally:
        found.close()


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-CUDA-002")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_architecture_and_weights_of_an_init_come_together_on_every_device(
    inputs: Inputs, tmp_path: Path, device: str
) -> None:
    flags = ("--device", device, "--model", str(inputs.model))
    own, without = preflight_of(inputs, tmp_path / "run", *flags)
    assert not without
    init = ("--device", device, "--init", str(inputs.pretrained))
    assert preflight_of(inputs, tmp_path / "run", *init) == (own, True)
    # Another architecture on the command line cannot separate the file's weights from its own.
    with pytest.raises(UsageError, match="both name an architecture"):
        preflight_of(inputs, tmp_path / "run", *init, "--model", "qwen2.5-7b")


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-CUDA-003")
def test_an_encoder_is_refused_before_the_device_is_touched(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tensors = {"bert.encoder.layer.0.attention.self.query.weight": np.ones((4, 4), np.float32)}
    model = write_apr(tmp_path / "bert.apr", tensors, {"hf_architecture": "BertModel"})
    flags = (*inputs.data_flags(), "--device", "cuda", "--init", str(model))
    assert run_here(*flags, "--run-dir", str(tmp_path / "run")) == ExitCode.GATE
    assert "[FALSIFY-APR-PRETRAIN-ARCH-007]" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.falsifies("FALSIFY-TOK-IMPORT-HF-001")
def test_the_verb_that_imports_a_tokenizer_exists(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tokenize", "import-hf", "--help"])
    assert stopped.value.code == 0
    assert "apr-dist tokenize import-hf" in " ".join(capfd.readouterr().out.split())
