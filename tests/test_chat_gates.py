"""What is refused before a run on conversations, by the run and by its plan alike, and what is reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from builders.chat_rows import END, Turns, build_rows, made_up
from builders.runs import metrics, run_here, verdict

from apr_dist.apr.reader import AprReader
from apr_dist.cli import main
from apr_dist.data.manifest import Manifest
from apr_dist.gates.conversations import template_digest

if TYPE_CHECKING:
    from builders.runs import Inputs

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def ended(count: int, seed: int) -> list[Turns]:
    """Conversations that end with the turn's end, which is a target."""
    found = made_up(count, vocab_size=512, longest=30, seed=seed)
    for one in found:
        one.ids[-1], one.is_target[-1] = END, True
    return found


def chat_sets(inputs: Inputs, folder: Path, **facts: Any) -> tuple[Path, Path]:
    """A training set and a held-out one with these facts in their manifests."""
    tokenizer = Manifest.load(inputs.train).tokenizer
    for name, count, seed in (("train", 90, 1), ("validation", 40, 2)):
        known = {"split": name, "tokenizer": tokenizer, **facts}
        build_rows(folder / name, ended(count, seed), 32, vocab_size=512, **known)
    return folder / "train", folder / "validation"


def flags(inputs: Inputs, sets: tuple[Path, Path], run: Path, *more: str) -> list[str]:
    given = ["--dataset", str(sets[0]), "--val-dataset", str(sets[1]), "--run-dir", str(run)]
    given += [
        "--tokenizer",
        str(inputs.tokenizer),
        "--batch-size",
        "4",
        "--num-steps",
        "1",
        "--seq-length",
        "32",
    ]
    return [*given, "--device", "cpu", "--parallel.cpu-threads", "1", *more]


def scratch(inputs: Inputs) -> tuple[str, ...]:
    return ("--mode", "from-scratch", "--model", str(inputs.model), "--warmup-steps", "0")


def stamped(inputs: Inputs, folder: Path) -> Path:
    """The pretrained model with a chat template of its own."""
    (folder / "chat.jinja").write_text(TEMPLATE)
    given = ["stamp", str(inputs.pretrained), "--chat-template", str(folder / "chat.jinja")]
    assert main([*given, "-o", str(folder / "chat.apr")]) == 0
    return folder / "chat.apr"


def other_tokenizer(inputs: Inputs) -> dict[str, Any]:
    tokenizer = Manifest.load(inputs.train).tokenizer
    assert tokenizer is not None
    return {"tokenizer": replace(tokenizer, sha256="b" * 64)}


REFUSED: dict[str, tuple[Callable[[Inputs], dict[str, Any]], str]] = {
    "nothing is trained on": (lambda _: {"targets": 0}, "nothing in it is trained on"),
    "no token ends a turn": (lambda _: {"turn_end": None}, "ends no turn with a token"),
    "a turn end that is never a target": (
        lambda _: {"turn_end": 511, "turn_end_targets": 0},
        "never trained on",
    ),
    "an end token beyond the model": (lambda _: {"turn_end": 512}, "which the model cannot emit"),
    "another tokenizer": (other_tokenizer, "the shards were encoded by tokenizer bbbbbbbbbbbb"),
}


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-039")
@pytest.mark.parametrize(("facts", "words"), REFUSED.values(), ids=REFUSED)
def test_a_set_that_cannot_teach_the_model_is_refused_by_run_and_plan(
    facts: Callable[[Inputs], dict[str, Any]],
    words: str,
    inputs: Inputs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = flags(inputs, chat_sets(inputs, tmp_path, **facts(inputs)), tmp_path / "run", *scratch(inputs))
    assert main(["plan", *given]) != 0
    said = capsys.readouterr()
    assert words in said.out + said.err
    assert run_here(*given) != 0
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-039")
def test_another_template_than_the_model_s_is_refused(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = stamped(inputs, tmp_path)
    with AprReader(model) as reader:
        own = template_digest(reader.metadata)
    assert own is not None
    for name, digest in (("other", "sha256:" + "1" * 64), ("own", own)):
        sets = chat_sets(inputs, tmp_path / name, template=digest)
        capsys.readouterr()
        main(["plan", *flags(inputs, sets, tmp_path / "run", "--init", str(model))])
        said = capsys.readouterr()
        assert ("rendered with the chat template" in said.out + said.err) is (name == "other"), said


def test_a_row_that_would_be_cut_and_compiled_blocks_are_refused(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = chat_sets(inputs, tmp_path)
    for more, words in (
        (("--seq-length", "48"), "would cut"),
        (("--compute.compile", "block"), "conversations and --compute.compile block"),
    ):
        assert main(["plan", *flags(inputs, sets, tmp_path / "run", *scratch(inputs), *more)]) != 0
        said = capsys.readouterr()
        assert words in said.out + said.err


def test_a_run_reports_what_it_trains_on(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = chat_sets(inputs, tmp_path)
    rows = Manifest.load(sets[0]).conversations
    assert rows is not None
    run = tmp_path / "run"
    assert run_here(*flags(inputs, sets, run, *scratch(inputs), "--target-val-loss", "9")) == 0
    said = capsys.readouterr()
    assert "tokens trained on (" in said.out + said.err
    assert "130 conversations" in said.out + said.err
    assert "conversations isolated by spans" in said.out
    gates = {gate["id"]: gate for gate in verdict(run)["gates"]}
    assert "the longest conversation" in gates["FALSIFY-APR-DIST-TRAINER-039"]["measured"]
    assert 0 < metrics(run)[0]["targets"] < 4 * 32
