"""Adapter folders as ``peft`` writes them, for tiny models of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from apr_dist.interop.importing import import_model
from apr_dist.model.families import Family
from builders.hf_models import SIZES, TOKENS, claims, hf_folder


def base_of(family: Family, folder: Path, **changes: Any) -> tuple[Path, Path]:
    """A random model of a family as a Hugging Face folder, and the APR file of it."""
    source = hf_folder(folder / "hf", {**SIZES, **claims(family), **changes})
    import_model(source, folder / "base.apr")
    return source, folder / "base.apr"


def peft_folder(source: Path, folder: Path, *, size: float = 0.3, **settings: Any) -> Path:
    """An adapter with random values of that size in all it holds, saved by ``peft``."""
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    draw = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                noise = torch.empty(weight.shape).normal_(0.0, size, generator=draw)
                weight.copy_(weight * (1 + size * noise) if "magnitude" in name else noise)
    model.save_pretrained(folder)
    return folder


def peft_logits(source: Path, folder: Path) -> torch.Tensor:
    """Logits of ``TOKENS`` by ``transformers`` and ``peft``."""
    from peft import PeftModel  # noqa: PLC0415

    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits
