"""Several named validation sets, and prompts answered at every evaluation: on one process and on several."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders.runs import Inputs, metrics, run_here, verdict
from builders.tokens import small_sources
from builders.warm_ranks import WarmRanks

from apr_dist.cli import main
from apr_dist.corpus.encode import encode_corpus
from apr_dist.data.manifest import Manifest
from apr_dist.errors import ExitCode
from apr_dist.interop.stamp import stamp_file
from apr_dist.interop.text_model import open_text_model
from apr_dist.model.generation import Sampling

TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
PROMPT = "def main():\n    import"


@pytest.fixture(scope="module")
def other(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out shards of other documents."""
    folder = tmp_path_factory.mktemp("other") / "other"
    encode_corpus(sources=small_sources(156)[150:], tokenizer=inputs.tokenizer, output=folder)
    return folder


def flags(inputs: Inputs, run_dir: Path, *more: str, val: bool = False) -> list[str]:
    given = inputs.data_flags()
    if not val:
        at = given.index("--val-dataset")
        del given[at : at + 2]
    given += ["--init", str(inputs.pretrained), "--run-dir", str(run_dir), "--num-steps", "4", "--lr", "1e-3"]
    return [*given, "--eval-every", "2", "--warmup-steps", "1", "--batch-size", "8", *more]


def sets(**folders: Path) -> list[str]:
    return ["--evaluation.sets", ",".join(f"{name}={folder}" for name, folder in folders.items())]


def losses(run_dir: Path) -> list[float]:
    return [line["val_loss"] for line in metrics(run_dir, "evaluation")]


def test_each_named_set_has_its_own_curve_and_one_counts(
    inputs: Inputs, other: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    named = sets(code=inputs.validation, more=other)
    assert run_here(*flags(inputs, tmp_path / "a", *named)) == ExitCode.OK
    assert "  more " in capfd.readouterr().out
    assert run_here(*flags(inputs, tmp_path / "b", *named, "--evaluation.counts", "more")) == ExitCode.OK
    assert run_here(*flags(inputs, tmp_path / "c", val=True)) == ExitCode.OK
    of_more = [line["val_losses"] for line in metrics(tmp_path / "a", "evaluation")]
    assert [list(line) for line in of_more] == [["more"]] * 3
    assert losses(tmp_path / "a") == losses(tmp_path / "c")  # a set changes nothing of the run
    assert losses(tmp_path / "b") == [line["more"] for line in of_more]
    swapped = [line["val_losses"]["code"] for line in metrics(tmp_path / "b", "evaluation")]
    assert swapped == losses(tmp_path / "a")
    facts = verdict(tmp_path / "b")["facts"]
    assert list(facts["validation_sets"]) == ["more", "code"]
    assert facts["val_data_fingerprint"] == facts["validation_sets"]["more"]
    assert verdict(tmp_path / "a")["facts"]["weights_digest"] == facts["weights_digest"]
    page = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "a"), "-o", str(page), "--samples", "0"]) == 0
    assert "validation loss of more" in page.read_text()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda a, b: [*sets(x=a, y=a)], "the validation sets x and y are the same folder"),
        (lambda a, b: [*sets(x=a, y=b), "--evaluation.counts", "z"], "evaluation.counts is z"),
        (lambda a, b: ["--evaluation.counts", "x"], "no set has that name"),
        (lambda a, b: [*sets(x=a), "--val-dataset", str(b)], "both name held-out shards"),
        (lambda a, b: ["--evaluation.sets", f"x={a},x={b}"], "each name once"),
        (lambda a, b: ["--evaluation.sets", f"a b={a}"], "evaluation.sets"),
        (lambda a, b: [*sets(x=a, y=a.parent / "none")], "manifest"),
    ],
    ids=["same folder", "unknown name", "no sets", "both", "name twice", "odd name", "missing"],
)
def test_sets_that_are_none_are_refused_by_run_and_plan(
    inputs: Inputs,
    other: Path,
    tmp_path: Path,
    make: Any,
    said: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    given = flags(inputs, tmp_path / "run", *make(inputs.validation, other))
    assert run_here(*given) != ExitCode.OK
    assert said in capfd.readouterr().err
    assert main(["plan", *given]) != 0
    printed = capfd.readouterr()
    assert said in " ".join((printed.err + printed.out).split())


def test_two_names_for_the_same_data_are_refused(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in inputs.validation.iterdir():
        os.link(path, copy / path.name)
    code = run_here(*flags(inputs, tmp_path / "run", *sets(one=inputs.validation, two=copy)))
    assert code == ExitCode.DATA
    assert "the validation sets one and two hold the same data" in capfd.readouterr().err


def test_a_set_of_another_tokenizer_is_refused(
    inputs: Inputs, other: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(other, tmp_path / "strange")
    known = Manifest.load(tmp_path / "strange")
    assert known.tokenizer is not None
    replace(known, tokenizer=replace(known.tokenizer, sha256="b" * 64)).write()
    given = flags(inputs, tmp_path / "run", *sets(one=inputs.validation, two=tmp_path / "strange"))
    assert run_here(*given) == ExitCode.GATE
    assert "the shards were encoded by tokenizer bbbbbbbbbbbb" in capfd.readouterr().err


def test_a_set_that_is_trained_on_is_refused(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = flags(inputs, tmp_path / "run", *sets(one=inputs.validation, two=inputs.train))
    assert run_here(*given) == ExitCode.DATA
    assert "is also training shard" in capfd.readouterr().err


def test_sets_may_come_and_go_at_a_resume_while_the_one_that_counts_stays(
    inputs: Inputs, other: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert run_here(*flags(inputs, run_dir, *sets(code=inputs.validation), "--num-steps", "2")) == ExitCode.OK
    more = sets(code=inputs.validation, more=other)
    changed = ["--resume", "auto", "--resume-allow", "num_steps"]
    assert run_here(*flags(inputs, run_dir, *more, *changed)) == ExitCode.OK
    lines = metrics(run_dir, "evaluation")
    assert [list(line.get("val_losses", {})) for line in lines] == [[], [], ["more"]]
    again = flags(inputs, run_dir, *more, "--evaluation.counts", "more", *changed, "--num-steps", "6")
    assert run_here(*again) == ExitCode.USAGE
    assert "the held-out shards were" in capfd.readouterr().err


def write_prompts(path: Path) -> Path:
    path.write_text(json.dumps(PROMPT) + "\n\n" + json.dumps({"prompt": "class A"}) + "\n")
    return path


def test_prompts_are_answered_at_every_evaluation_as_generate_answers_them(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "--evaluation.prompts",
        str(write_prompts(tmp_path / "p.jsonl")),
        "--evaluation.answer-tokens",
        "9",
    ]
    run_dir = tmp_path / "run"
    assert run_here(*flags(inputs, run_dir, *asked, val=True)) == ExitCode.OK
    assert "->" in capfd.readouterr().out
    lines = metrics(run_dir, "answers")
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert [one["prompt"] for one in lines[0]["answers"]] == [PROMPT, "class A"]
    for model, line in ((inputs.pretrained, lines[0]), (run_dir / "checkpoint.apr", lines[-1])):
        speaker = open_text_model(model)
        pieces = speaker.speak(speaker.encode(PROMPT), Sampling(max_new_tokens=9))
        assert line["answers"][0]["answer"] == "".join(piece.text for piece in pieces)
    assert run_here(*flags(inputs, tmp_path / "without", val=True)) == ExitCode.OK
    digests = [verdict(one)["facts"]["weights_digest"] for one in (run_dir, tmp_path / "without")]
    assert digests[0] == digests[1]
    page = tmp_path / "report.html"
    assert main(["report", str(run_dir), "-o", str(page)]) == 0
    html = page.read_text()
    assert "before training" in html
    assert "step 2" in html


def test_prompts_are_chats_where_the_model_has_a_template(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    stamp_file(inputs.pretrained, tmp_path / "m.apr", changes={}, chat_template=tmp_path / "t.jinja")
    (tmp_path / "p.txt").write_text("class A\n")
    asked = ["--evaluation.prompts", str(tmp_path / "p.txt"), "--evaluation.answer-tokens", "5"]
    given = flags(inputs, tmp_path / "run", *asked, "--init", str(tmp_path / "m.apr"), val=True)
    assert run_here(*given) == ExitCode.OK
    speaker = open_text_model(tmp_path / "m.apr")
    ids = speaker.encode_chat([{"role": "user", "content": "class A"}])
    assert ids == speaker.encode("class A\n")
    pieces = speaker.speak(ids, Sampling(max_new_tokens=5), chat=True)
    answered = metrics(tmp_path / "run", "answers")[0]["answers"][0]["answer"]
    assert answered == "".join(piece.text for piece in pieces)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", None, "cannot be read"),
        ("empty.txt", "\n \n", "there is no prompt"),
        ("bad.jsonl", "{", "bad.jsonl:1: the line is not JSON"),
        ("odd.jsonl", "3", "the line is no prompt"),
        ("silent.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}', "no user says anything"),
        ("long.txt", "x" * 400, "and its answer may have 64"),
        ("huge.txt", "x\n" * 600_000, "at most 1,048,576"),
        ("chat.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', "carries no chat template"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused_before_the_first_step(
    inputs: Inputs,
    tmp_path: Path,
    name: str,
    content: str | None,
    said: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    asked = ["--evaluation.prompts", str(tmp_path / name)]
    assert run_here(*flags(inputs, tmp_path / "run", *asked, val=True)) != ExitCode.OK
    assert said in capfd.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not metrics(tmp_path / "run")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_sets_and_prompts_are_the_same_on_ranks(
    inputs: Inputs, other: Path, tmp_path: Path, strategy: str, ranks: WarmRanks
) -> None:
    named = sets(code=inputs.validation, more=other)
    asked = [
        "--evaluation.prompts",
        str(write_prompts(tmp_path / "p.jsonl")),
        "--evaluation.answer-tokens",
        "9",
    ]
    given = [*named, *asked, "--micro-batch-size", "2", "--num-steps", "2"]
    assert run_here(*flags(inputs, tmp_path / "alone", *given)) == ExitCode.OK
    spread = flags(inputs, tmp_path / strategy, *given, "--parallel.strategy", strategy)
    ended = ranks.launch(spread, world_size=2)
    assert ended.codes == (0, 0), ended.errors
    assert verdict(tmp_path / strategy)["facts"]["strategy"] == strategy
    one, two = (metrics(tmp_path / name, "evaluation") for name in ("alone", strategy))
    for line, same in zip(one, two, strict=True):
        assert same["val_losses"]["more"] == pytest.approx(line["val_losses"]["more"], rel=1e-5)
    one, two = (metrics(tmp_path / name, "answers") for name in ("alone", strategy))
    assert [line["answers"] for line in two] == [line["answers"] for line in one]
