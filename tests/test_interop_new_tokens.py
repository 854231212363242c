"""``apr-dist import --add-tokens``: a tokenizer that knows them, rows by the rule, a head that stays tied."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from builders.adapters import base_of
from builders.hf_models import logits_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from apr_dist.apr.reader import AprReader
from apr_dist.cli import main
from apr_dist.errors import ExitCode
from apr_dist.gates.model_file import prove_model
from apr_dist.model.families import Family

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def source_with(reserved: int, folder: Path, *, tied: bool) -> tuple[Path, int]:
    """A random model as a Hugging Face folder with so many rows of no token; and the number of all rows."""
    source, base = base_of(Family.LLAMA, folder, tie_word_embeddings=tied)
    with AprReader(base) as reader:
        rows = prove_model(reader).config.vocab_size
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {one: number for number, one in enumerate(alphabet[: rows - reserved])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(source / "tokenizer.json"))
    return source, rows


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("reserved", [0, 1, 5], ids=["none in reserve", "one", "enough"])
def test_new_rows_are_the_mean_of_the_tokens_that_were(
    reserved: int, tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, rows = source_with(reserved, tmp_path, tied=tied)
    known = rows - reserved
    before, after = tmp_path / "before.apr", tmp_path / "after.apr"
    assert main(["import", str(source), "-o", str(before)]) == ExitCode.OK
    new = ["<|one|>", "<|two|>"]
    capsys.readouterr()
    assert main(["import", str(source), "-o", str(after), "--add-tokens", ",".join(new)]) == ExitCode.OK
    said = capsys.readouterr().out
    ids = range(known, known + len(new))
    assert f"--adapter.train-embeddings {','.join(map(str, ids))}" in said
    with AprReader(before) as one, AprReader(after) as other:
        config = prove_model(other).config
        assert config.vocab_size == max(rows, known + len(new))
        assert config.tie_word_embeddings is tied
        assert one.tensors.keys() == other.tensors.keys()
        for name in other.tensors:
            old, values = one.float32(name), other.float32(name)
            if name not in (EMBEDDING, HEAD):
                assert np.array_equal(old, values)
                continue
            assert np.array_equal(old[:known], values[:known])
            assert np.allclose(values[list(ids)], old[:known].mean(0), atol=1e-6)
    assert main(["validate", str(after)]) == ExitCode.OK
    # Old tokens have the logits that they had, and transformers reads the new ones as one token each.
    assert reserved or torch.allclose(
        logits_of(after)[..., :known], logits_of(before)[..., :known], atol=1e-6
    )
    assert main(["export", str(after), "--to", "huggingface", "-o", str(tmp_path / "out")]) == ExitCode.OK
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("<|two|>A<|one|>")[0] == known + 1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == config.vocab_size
    folder = tmp_path / "after.tokenizer" / "tokenizer.json"
    assert Tokenizer.from_file(str(folder)).token_to_id("<|one|>") == known


@pytest.mark.parametrize(
    ("tokens", "said"),
    [("A", "'A' is a token already"), ("<x>,<x>", "'<x>' is given twice"), ("<x>,,<y>", "'' is empty")],
)
def test_what_is_no_new_token_is_refused_and_leaves_nothing(
    tokens: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = source_with(0, tmp_path, tied=True)
    there = set(tmp_path.iterdir())
    target = tmp_path / "new.apr"
    assert main(["import", str(source), "-o", str(target), "--add-tokens", tokens]) == ExitCode.USAGE
    assert said in " ".join(capsys.readouterr().err.split())
    assert set(tmp_path.iterdir()) == there
    (source / "tokenizer.json").unlink()
    assert main(["import", str(source), "-o", str(target), "--add-tokens", "<x>"]) != ExitCode.OK
    assert set(tmp_path.iterdir()) == there
