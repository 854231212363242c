"""Tiny random models of ``transformers`` from a ``config.json``, and the same through an import."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from apr_dist.apr.reader import AprReader
from apr_dist.gates.model_file import prove_model
from apr_dist.interop.importing import import_model
from apr_dist.interop.text_model import load_decoder
from apr_dist.model.families import Family

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
TOKENS = torch.randint(48, (2, 24), generator=torch.Generator().manual_seed(5))


def claims(family: Family) -> dict[str, Any]:
    """The keys that name the family, and no padding id where its own default has no row here."""
    pad = family.definition.hf_defaults.get("pad_token_id") or 0
    named = {"architectures": [family.hf_architecture], "model_type": family.hf_model_type}
    return named | ({"pad_token_id": None} if pad >= SIZES["vocab_size"] else {})


def hf_folder(folder: Path, config: Mapping[str, Any], *, seed: int = 0) -> Path:
    """A folder with exactly this ``config.json`` and random weights of the shapes that it means."""
    folder.mkdir(parents=True)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = (
                float(parameter[0]) if name.endswith("norm.weight") else 0.0
            )  # one, or of one-plus norms zero
            parameter.normal_(mean, 0.2, generator=generator)
    tensors = dict(model.named_parameters())  # a tied head is listed once
    save_file(
        {name: value.detach().contiguous() for name, value in tensors.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def reference_logits(folder: Path) -> torch.Tensor:
    """Logits of ``TOKENS`` as ``transformers`` computes them for that folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


def logits_of(path: Path) -> torch.Tensor:
    """Logits of ``TOKENS`` of an APR file, opened through the gates that a run opens it with."""
    with AprReader(path) as reader:
        decoder = load_decoder(reader, prove_model(reader).config)
    with torch.no_grad():
        logits = decoder(TOKENS)
    assert isinstance(logits, torch.Tensor)
    return logits


def imported_logits(source: Path, target: Path) -> torch.Tensor:
    """Logits of ``TOKENS`` after an import of the folder or file."""
    import_model(source, target, overwrite=True)
    return logits_of(target)
