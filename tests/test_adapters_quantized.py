"""A base in 4 and 8 bits: what arrives is what the file's matrix is quantised to; what merging it means."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from builders.adapter_ranks import last, make_runs, peft_model, reopened
from builders.models import tiny_config
from builders.runs import metrics
from builders.sessions import open_alone
from conftest import shared_folder

from apr_dist.apr.reader import AprReader
from apr_dist.choices import Strategy
from apr_dist.cli import main
from apr_dist.errors import ExitCode, WeightsRefused
from apr_dist.gates import adapters as gate
from apr_dist.gates.model_file import prove_model
from apr_dist.interop.text_model import load_decoder
from apr_dist.model.families import Family
from apr_dist.model.quantized import dequantize, quantize, quantized_layers
from apr_dist.parallel.weights import prove_weights, weight_digests

if TYPE_CHECKING:
    from builders.runs import Inputs
    from builders.warm_ranks import WarmRanks

NF4 = np.fromstring(
    "-1 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635"
    " -0.18477343022823334 -0.09105003625154495 0 0.07958029955625534 0.16093020141124725"
    " 0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941"
    " 0.7229568362236023 1",
    np.float32,
    sep=" ",
)
"""The sixteen values of nf4 (arXiv:2305.14314, appendix E)."""


@pytest.fixture(scope="module")
def runs(inputs: Inputs, ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(inputs, ranks, shared_folder(tmp_path_factory) / "adapters")


@pytest.mark.parametrize("shape", [(64, 96), (33, 50), (3, 7)])
def test_codes_are_those_of_the_papers(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(1).normal(0.0, 0.02, shape).astype(np.float32)
    codes, *rest = (one.numpy() for one in quantize(torch.from_numpy(matrix), 4))
    blocks = np.pad(matrix.reshape(-1), (0, -matrix.size % 64)).reshape(-1, 64)
    scales = np.abs(blocks).max(1)
    nearest = np.abs((blocks / scales[:, None])[..., None] - NF4).argmin(-1).reshape(-1)
    found = np.stack([codes >> 4, codes & 15], -1).reshape(-1)[: matrix.size]
    assert (found == nearest[: matrix.size]).mean() > 0.999  # but for ties, as floats are divided
    quantised, outer, mean, table = rest
    assert mean[0] == pytest.approx(scales.mean(), rel=1e-6)
    widened = table[quantised] * np.repeat(outer, 256)[: len(scales)] + mean
    assert np.abs(widened - scales).max() <= np.abs(scales - scales.mean()).max() * 0.02
    made = dequantize(quantize(torch.from_numpy(matrix), 4), shape, torch.float32).numpy()
    assert np.allclose(made.reshape(-1), NF4[found] * np.repeat(widened, 64)[: matrix.size], atol=1e-7)

    rows, largest = (one.numpy() for one in quantize(torch.from_numpy(matrix), 8))
    half = matrix.astype(np.float16).astype(np.float32)
    assert np.array_equal(largest, np.abs(half).max(1))
    exact = dequantize(quantize(torch.from_numpy(matrix), 8), shape, torch.float32).numpy()
    assert np.abs(exact - matrix).max() <= largest.max() / 127
    assert np.allclose(exact, rows.reshape(shape) * largest[:, None] / 127, atol=1e-8)


@pytest.mark.falsifies("FALSIFY-APR-DIST-ADAPTER-004")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_code_that_is_not_that_of_the_file_is_refused(bits: int) -> None:
    adapter = {"kind": "lora", "rank": 2, "base": {"bits": bits}}
    with open_alone(tiny_config(Family.LLAMA), Strategy.SINGLE, adapter=adapter) as session:
        layers = quantized_layers(session.model)
        assert len(layers) == 7 * session.model.config.num_layers
        before = weight_digests(session.model, session.runtime)
        prove_weights(session.model, before, session.runtime)
        for number in range(len(next(iter(layers.values())).stored())):
            stored = next(iter(layers.values())).stored()[number].view(torch.uint8)
            stored[0] ^= 1
            with pytest.raises(WeightsRefused, match="differ from what they were loaded from"):
                prove_weights(session.model, before, session.runtime)
            stored[0] ^= 1
        name = "model.layers.0.mlp.up_proj.weight"
        held = session.weight(name)
        session.set_weight(name, held * 2)
        assert torch.allclose(session.weight(name), held * 2, rtol=0.03, atol=1e-4)


@pytest.mark.falsifies("FALSIFY-APR-DIST-ADAPTER-004")
def test_the_codes_in_the_network_are_those_of_the_file(inputs: Inputs) -> None:
    with AprReader(inputs.pretrained) as reader:
        model = prove_model(reader).config
        settings: dict[str, Any] = {"adapter": {"kind": "lora", "base": {"bits": 4}}}
        with open_alone(inputs.pretrained, Strategy.SINGLE, **settings) as session:
            for name, layer in quantized_layers(session.model).items():
                plain = name.replace(".base_layer", "")
                matrix = torch.from_numpy(reader.float32(f"{plain}.weight").copy())
                for held, expected in zip(layer.stored(), quantize(matrix, 4), strict=True):
                    assert torch.equal(held, expected)
        assert len(quantized_layers(session.model)) == 7 * model.num_layers


def test_peft_opens_the_folder_beside_the_base_that_transformers_quantises(
    runs: Path, inputs: Inputs
) -> None:
    folder = runs / "lora-nf4" / "adapter"
    rows = torch.load(runs / "batches.pt", weights_only=True)[0].long()[:, :-1]
    with torch.no_grad(), AprReader(inputs.pretrained) as reader:
        # There is no dropout; in eval mode bitsandbytes rounds every product on a CPU to bf16.
        expected = peft_model(inputs, folder, bits=4).train()(input_ids=rows).logits
        found = load_decoder(reader, prove_model(reader).config, adapter=folder)(rows)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert "nf4" in (folder / "README.md").read_text()


def test_a_quantised_base_is_merged_as_it_was_kept_or_as_it_is_in_the_file(
    runs: Path, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = str(inputs.pretrained), str(last(runs / "lora-nf4") / "adapter")
    sizes = ("--dataset", str(inputs.validation), "--seq-length", "32", "--max-sequences", "16")
    trained = metrics(runs / "lora-nf4", "evaluation")[-1]["val_loss"]

    def loss(*given: str) -> float:
        capsys.readouterr()
        assert main(["eval", *given, *sizes, "--device", "cpu", "--json"]) == ExitCode.OK
        return float(json.loads(capsys.readouterr().out)["loss"])

    assert loss(base, "--adapter", adapter) == pytest.approx(trained, abs=1e-6)
    merged = str(tmp_path / "merged.apr")
    flags = ["merge", "--base", base, "--adapter", adapter, "-o"]
    assert main([*flags, merged]) == ExitCode.OK
    assert "the base had 4 bits in training and is merged as it was kept" in capsys.readouterr().out
    assert loss(merged) == pytest.approx(trained, abs=1e-4)
    own = str(tmp_path / "own.apr")
    assert main([*flags, own, "--into", "original"]) == ExitCode.OK
    assert "the adapter never saw these" in capsys.readouterr().out
    assert loss(own) != pytest.approx(trained, abs=1e-4)


def test_a_base_in_few_bits_is_refused_where_it_would_be_cut(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for strategy in ("fsdp2", "zero3"):
        flags = ["plan", *inputs.data_flags(), "--init", str(inputs.pretrained), "--num-steps", "10"]
        flags += ["--run-dir", str(tmp_path / "run"), "--adapter.kind", "lora", "--adapter.base.bits", "4"]
        assert main([*flags, "--processes", "2", "--parallel.strategy", strategy]) != ExitCode.OK
        said = " ".join(capfd.readouterr().out.split())
        assert f"a base in 4 bits is not trained under strategy {strategy}" in said


def test_a_missing_library_is_named_before_anything_is_loaded(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(gate, "find_spec", lambda name: None if name == "bitsandbytes" else there(name))
    assert reopened(tmp_path / "run", inputs, "--adapter.base.bits", "8") == ExitCode.USAGE
    assert "pip install 'apr-dist[bitsandbytes]'" in " ".join(capfd.readouterr().err.split())
