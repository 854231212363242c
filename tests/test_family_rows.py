"""Every family, in odd shapes, equals ``transformers``: imported, trained, exported and read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from builders.families import CASES, ROWS, odd_config
from builders.files import write_apr
from builders.hf_models import TOKENS, hf_folder, logits_of, reference_logits
from builders.reference import as_stored
from transformers import AutoConfig, AutoModelForCausalLM

from apr_dist.apr.reader import AprReader
from apr_dist.errors import UnsupportedModelFile
from apr_dist.gates.model_file import prove_model
from apr_dist.interop.gguf_export import GgufType, export_gguf
from apr_dist.interop.gguf_names import to_gguf
from apr_dist.interop.hf_export import export_huggingface
from apr_dist.interop.importing import import_model
from apr_dist.interop.joined import stored_tensors
from apr_dist.interop.text_model import load_decoder
from apr_dist.model.families import Family
from apr_dist.model.transformer import Decoder

BOUND = 1e-5
STEPS = 5
READ_BY_TRANSFORMERS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
"""Families whose GGUF ``transformers`` reads too; not all keys, so it is given the configuration."""


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within 1e-5 of the largest value, or 1e-7 (a gradient may be zero by algebra)."""
    return bool((found - expected).abs().max() <= BOUND * expected.abs().max().clamp(min=1e-2))


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def opened(path: Path) -> Decoder:
    with AprReader(path) as reader:
        return load_decoder(reader, prove_model(reader).config)


def reference_loss(model: Any) -> torch.Tensor:
    logits = model(TOKENS[:, :-1]).logits.flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, TOKENS[:, 1:].flatten())


def our_loss(model: Decoder) -> torch.Tensor:
    result = model(TOKENS[:, :-1], TOKENS[:, 1:])
    assert isinstance(result, tuple)
    return result[0] / result[1]


@pytest.mark.shows("trained", "from and to Hugging Face")
@pytest.mark.parametrize(("family", "number"), CASES)
def test_import_training_export_and_reload_equal_the_reference(
    family: str, number: int, tmp_path: Path
) -> None:
    """Logits, every gradient, five training steps, and the logits of what was exported after them."""
    folder = hf_folder(tmp_path / "in", odd_config(family, number))
    import_model(folder, tmp_path / "x.apr")
    ours, theirs = (
        opened(tmp_path / "x.apr"),
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    )
    assert near(logits_of(tmp_path / "x.apr"), reference_logits(folder))
    our_loss(ours).backward()
    reference_loss(theirs).backward()
    found = as_stored(ours.config, {name: gradient(one) for name, one in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        assert near(found[name], gradient(parameter)), name
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for model in (ours, theirs)]
    for _ in range(STEPS):
        losses = []
        for model, loss, optimizer in zip(
            (ours, theirs), (our_loss, reference_loss), optimizers, strict=True
        ):
            optimizer.zero_grad()
            value = loss(model)
            value.backward()
            optimizer.step()
            losses.append(value.item())
        assert losses[0] == pytest.approx(losses[1], rel=BOUND)
    with AprReader(tmp_path / "x.apr") as reader:
        weights = {name: value.detach().numpy() for name, value in ours.named_parameters()}
        write_apr(tmp_path / "y.apr", weights, reader.metadata.to_mapping())
    export_huggingface(tmp_path / "y.apr", tmp_path / "out")
    trained = reference_logits(tmp_path / "out")
    with torch.no_grad():
        assert near(ours(TOKENS), trained)  # type: ignore[arg-type]
        assert near(theirs(TOKENS).logits, trained)
    import_model(tmp_path / "out", tmp_path / "z.apr")
    assert torch.equal(logits_of(tmp_path / "z.apr"), logits_of(tmp_path / "y.apr"))


@pytest.mark.shows("from and to GGUF")
@pytest.mark.parametrize("family", [one for one in ROWS if Family(one).definition.gguf.exported])
def test_gguf_there_and_back_is_the_same_model(family: str, tmp_path: Path) -> None:
    windows = {"sliding_window": 1000} if family == "mistral" else {}
    folder = hf_folder(tmp_path / "in", odd_config(family, 0) | windows)
    import_model(folder, tmp_path / "x.apr")
    export_gguf(tmp_path / "x.apr", tmp_path / "x.gguf", kind=GgufType.F32)
    import_model(tmp_path / "x.gguf", tmp_path / "y.apr")
    assert near(logits_of(tmp_path / "y.apr"), logits_of(tmp_path / "x.apr"))
    if family in READ_BY_TRANSFORMERS:
        settings = AutoConfig.for_model(**odd_config(family, 0) | windows)
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="x.gguf", config=settings, dtype=torch.float32
        )
        with torch.no_grad():
            assert near(theirs(TOKENS).logits, logits_of(tmp_path / "x.apr"))


@pytest.mark.parametrize("family", ROWS)
def test_gguf_names_are_those_of_the_gguf_package(family: str, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "in", odd_config(family, 0))
    import_model(folder, tmp_path / "x.apr")
    form = Family(family).definition.gguf
    with AprReader(tmp_path / "x.apr") as reader:
        model = prove_model(reader).config
    names, layers = list(stored_tensors(model)), model.num_layers
    architecture = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[form.architecture]
    known = gguf.get_tensor_name_map(architecture, layers)
    for name in names:
        assert to_gguf(name, form) == known.get_name(name, try_suffixes=(".weight", ".bias")), name


UNSAYABLE = (
    ("gemma2", 1, "query_pre_attn_scalar 7"),
    ("gemma3", 1, "query_pre_attn_scalar 7"),
    ("smollm3", 1, "which of its layers rotate nothing"),
    ("mistral", 0, "its window of 5 tokens"),
    ("ministral3", 1, "its window of 5 tokens"),
    ("phi3", 1, "its window of 5 tokens"),
    ("phi3", 3, "heads of 24 dimensions"),
    ("olmo2", 1, "heads of 24 dimensions"),
    ("olmo2", 2, "a head that is the embedding"),
    ("olmo3", 1, "which of its layers have a window"),
    ("olmo3", 2, "a RoPE base of its own"),
    ("qwen2", 2, "the rotary scaling dynamic"),
    ("qwen3", 2, "the rotary scaling longrope"),
)
"""Family, row, and what of it a GGUF file cannot state."""


@pytest.mark.parametrize(("family", "number", "what"), UNSAYABLE)
def test_what_gguf_has_no_word_for_is_refused_by_name(
    family: str, number: int, what: str, tmp_path: Path
) -> None:
    import_model(hf_folder(tmp_path / "in", odd_config(family, number)), tmp_path / "x.apr")
    with pytest.raises(UnsupportedModelFile, match=what):
        export_gguf(tmp_path / "x.apr", tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()
