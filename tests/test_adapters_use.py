"""What is done with an adapter that is not merged: generate, eval, diff, inspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders.adapter_ranks import half, last, make_runs
from builders.runs import metrics
from conftest import shared_folder

from apr_dist.cli import main
from apr_dist.errors import ExitCode
from apr_dist.report.run_folder import read_runs
from apr_dist.report.samples import make_samples

if TYPE_CHECKING:
    from builders.runs import Inputs
    from builders.warm_ranks import WarmRanks


@pytest.fixture(scope="module")
def runs(inputs: Inputs, ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(inputs, ranks, shared_folder(tmp_path_factory) / "adapters")


def measured(capsys: pytest.CaptureFixture[str], *given: object) -> dict[str, float]:
    assert main(["eval", *map(str, given), "--json"]) == ExitCode.OK
    found: dict[str, float] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "bias", "tokens"])
def test_eval_measures_what_the_run_measured(
    kind: str, runs: Path, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--dataset", inputs.validation, "--seq-length", "32", "--max-sequences", "16", "--device", "cpu")
    losses = [line["val_loss"] for line in metrics(runs / kind, "evaluation")]
    base = measured(capsys, inputs.pretrained, *sizes)
    assert base["loss"] == pytest.approx(losses[0], abs=1e-6)
    for adapter in (runs / kind / "adapter", last(runs / kind) / "checkpoint.apr"):
        found = measured(capsys, inputs.pretrained, *sizes, "--adapter", adapter)
        assert found["loss"] == pytest.approx(losses[-1], abs=1e-6)
        assert found["tokens"] == base["tokens"] == 16 * 32
    merged = tmp_path / "merged.apr"
    flags = ["--base", str(inputs.pretrained), "--adapter", str(runs / kind / "adapter"), "-o", str(merged)]
    assert main(["merge", *flags]) == ExitCode.OK
    capsys.readouterr()
    assert measured(capsys, merged, *sizes)["loss"] == pytest.approx(losses[-1], abs=1e-4)


def test_generate_speaks_with_an_adapter_as_the_merged_model_does(
    runs: Path, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged, adapter = tmp_path / "merged.apr", str(runs / "lora" / "adapter")
    base = str(inputs.pretrained)
    assert main(["merge", "--base", base, "--adapter", adapter, "-o", str(merged)]) == ExitCode.OK
    capsys.readouterr()
    said = []
    for given in ([base, "--adapter", adapter], [str(merged)], [base]):
        flags = ["--prompt", "import numpy", "--max-tokens", "24", "--device", "cpu", "--json"]
        assert main(["generate", *given, *flags]) == ExitCode.OK
        said.append(json.loads(capsys.readouterr().out)["tokens"])
    assert said[0] == said[1] != said[2]


def test_an_adapter_of_other_weights_does_not_speak(
    runs: Path, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, adapter = tmp_path / "other.apr", str(runs / "lora" / "adapter")
    assert main(["merge", "--base", str(inputs.pretrained), "--adapter", adapter, "-o", str(other)]) == 0
    assert main(["generate", str(other), "--prompt", "x", "--adapter", adapter]) == ExitCode.GATE
    assert "the adapter belongs to weights" in capsys.readouterr().err
    code = main(["eval", str(other), "--dataset", str(inputs.validation), "--adapter", adapter])
    assert code == ExitCode.GATE


def test_eval_refuses_what_does_not_fit(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["eval", str(inputs.pretrained), "--dataset", str(inputs.validation)]
    assert main([*given, "--seq-length", "4096"]) == ExitCode.USAGE
    assert "seq_length 4,096 is more than the model's 256 positions" in capsys.readouterr().err
    assert main(["eval", str(inputs.pretrained), "--dataset", str(tmp_path)]) == ExitCode.DATA


def test_a_report_names_the_adapter_and_lets_it_speak(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(runs / "lora-nf4"), "-o", str(page), "--samples", "1"]) == ExitCode.OK
    text = page.read_text()
    assert "lora of rank 4, alpha 16.0, beside a base in 4 bits" in text
    assert "No samples" not in text
    (run,) = read_runs([runs / "lora-nf4"])
    (sample,) = make_samples(run, count=1).rows
    assert sample.after is not None
    assert sample.before is not None


def test_diff_and_inspect_know_an_adapter(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (str(place(runs / "lora") / "checkpoint.apr") for place in (half, last))
    assert main(["diff", first, second]) == 1
    said = capsys.readouterr().out
    assert "q_proj.lora_A.weight" in said
    assert main(["diff", first, first]) == 0
    capsys.readouterr()
    assert main(["inspect", first]) == ExitCode.OK
    said = " ".join(capsys.readouterr().out.split())
    assert "lora of rank 4, alpha 16" in said
    assert "sha256:" in said
    assert main(["validate", first]) == ExitCode.MODEL_FILE
    assert "apr-dist merge" in capsys.readouterr().err
