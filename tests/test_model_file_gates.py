"""One gate for model files: each command that takes one gives training's answer, in training's words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders.defective_models import DEFECTS
from builders.files import TINY_METADATA, tiny_tensors, write_apr

from apr_dist.cli import main
from apr_dist.errors import ExitCode

if TYPE_CHECKING:
    from builders.runs import Inputs

COMMANDS = (
    "validate MODEL",
    "generate MODEL --prompt x",
    "stamp MODEL --license MIT -o OUT",
    "diff MODEL MODEL",
    "diff WHOLE MODEL",
    "export MODEL --to huggingface -o OUT",
    "export MODEL --to safetensors -o OUT",
    "export MODEL --to gguf -o OUT",
)


def refusal(capfd: pytest.CaptureFixture[str]) -> str:
    """The error's own paragraph on standard error."""
    said = " ".join(capfd.readouterr().err.split())
    return said[said.index("error:") :]


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_command_refuses_what_training_refuses_in_its_words(
    defect: str, inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from builders.runs import run_here  # noqa: PLC0415  (imports PyTorch)

    spoiled = DEFECTS[defect]
    model = spoiled.write(tmp_path / "model.apr")
    whole = write_apr(tmp_path / "whole.apr", tiny_tensors(), TINY_METADATA)
    flags = [*inputs.data_flags(), "--init", str(model), "--run-dir", str(tmp_path / "run")]
    code = run_here(*flags)
    words = refusal(capfd)
    assert code in (ExitCode.GATE, ExitCode.MODEL_FILE)
    assert spoiled.words in words
    commands = [*COMMANDS, *(() if spoiled.imports or spoiled.unstated else ("import MODEL -o OUT",))]
    before = sorted(path.name for path in tmp_path.iterdir())
    for command in commands:
        paths = {"MODEL": str(model), "WHOLE": str(whole), "OUT": str(tmp_path / "out")}
        assert main([paths.get(word, word) for word in command.split()]) == code, command
        assert refusal(capfd) == words, command
        assert sorted(path.name for path in tmp_path.iterdir()) == before, command
    if not spoiled.values:  # a plan does not read values
        plan = ["plan", *flags]
        assert main(plan) == code
        assert refusal(capfd) == words


@pytest.mark.parametrize("defect", [name for name, spoiled in DEFECTS.items() if spoiled.imports])
def test_an_import_brings_the_file_of_another_program_into_the_form_that_is_trained(
    defect: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = DEFECTS[defect].write(tmp_path / "model.apr")
    assert main(["import", str(model), "-o", str(tmp_path / "plain.apr")]) == 0
    assert "note: " in capfd.readouterr().out
    assert main(["validate", str(tmp_path / "plain.apr")]) == 0
    whole = write_apr(tmp_path / "whole.apr", tiny_tensors(), TINY_METADATA)
    capfd.readouterr()
    assert main(["diff", str(whole), str(tmp_path / "plain.apr")]) in (0, 1)
    reordered = 4 if "pairs" in defect else 0
    assert f"{20 - reordered} tensor(s) identical, {reordered} differ" in capfd.readouterr().out


@pytest.mark.parametrize("defect", [name for name, spoiled in DEFECTS.items() if spoiled.unstated])
def test_the_stamp_that_a_refusal_prints_states_what_is_missing(
    defect: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = DEFECTS[defect].write(tmp_path / "model.apr")
    assert main(["validate", str(model)]) == ExitCode.GATE
    command = refusal(capfd).split("apr-dist ")[1].split(". ")[0].split()
    keys = [word[2:].replace("-", "_") for word in command if word.startswith("--")]
    values = (str(TINY_METADATA[key]) for key in keys)
    assert main([next(values) if word == "VALUE" else word for word in command]) == 0
    assert main(["validate", "stamped.apr"]) == 0
    assert main(["import", str(model), "-o", "copy"]) == 0
    assert "apr-dist stamp copy " in capfd.readouterr().out


@pytest.mark.parametrize(
    "defect", ["tie as text", "a head said to be its own", "attention biases that nothing states"]
)
def test_the_stamp_that_a_refusal_prints_corrects_the_file(
    defect: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = DEFECTS[defect].write(tmp_path / "model.apr")
    assert main(["validate", str(model)]) == ExitCode.GATE
    command = refusal(capfd).split("apr-dist ")[1].split(". ")[0].split(",")[0].split()
    assert main(command) == 0
    assert main(["validate", "stamped.apr"]) == 0


def test_the_whole_file_passes_every_command(tmp_path: Path) -> None:
    whole = write_apr(tmp_path / "whole.apr", tiny_tensors(), TINY_METADATA)
    for number, command in enumerate((*COMMANDS, "import MODEL -o OUT")):
        if command.startswith("generate"):
            continue  # it needs a tokenizer as well
        paths = {"MODEL": str(whole), "WHOLE": str(whole), "OUT": str(tmp_path / f"out{number}" / "out")}
        Path(paths["OUT"]).parent.mkdir()
        assert main([paths.get(word, word) for word in command.split()]) == 0, command
