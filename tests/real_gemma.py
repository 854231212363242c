"""Gemma 3 270M, the real one, from its GGUF: loss beside ``transformers``, 20 steps, export, and read again.

``python tests/real_gemma.py MODEL.gguf FOLDER``; needs about 8 GB of memory and of disk. Exits with 1 where a
figure is out of bounds.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import textwrap
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from apr_dist.apr.layout import DType
from apr_dist.apr.reader import AprReader
from apr_dist.cli import main as apr_dist
from apr_dist.gates.model_file import prove_model
from apr_dist.interop.importing import import_model
from apr_dist.interop.text_model import load_decoder
from apr_dist.train import main as train

BOUND = 1e-3
STEPS = 20
LENGTH = 128


def texts(tokenizer: Path) -> torch.Tensor:
    """Tokens ``[4, LENGTH]`` of the standard library, each row after the token that begins a text."""
    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    rows = []
    for module in (inspect, json, textwrap, argparse):
        ids = encoder.encode(inspect.getsource(module), add_special_tokens=False).ids
        rows.append([2, *ids[: LENGTH - 1]])
    return torch.tensor(rows)


def our_loss(path: Path, tokens: torch.Tensor) -> float:
    """Mean loss of an APR file."""
    with AprReader(path) as reader, torch.no_grad():
        total, count = load_decoder(reader, prove_model(reader).config)(tokens[:, :-1], tokens[:, 1:])
    return float(total / count)


def reference_loss(gguf: Path, tokens: torch.Tensor) -> float:
    """Mean loss of the GGUF as ``transformers`` reads and dequantises it."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits.flatten(0, 1).float()
    return float(torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()))


def check(what: str, found: float, expected: float) -> None:
    """Print both, and stop where they differ by more than the bound."""
    print(f"{what}: {found:.6f}, expected {expected:.6f}", flush=True)
    if abs(found - expected) > BOUND:
        raise SystemExit(f"{what} differs by {abs(found - expected):.2e}, more than {BOUND}")


def command(*arguments: object) -> None:
    """Run a verb of apr-dist in this process."""
    code = apr_dist([str(one) for one in arguments])
    if code:
        raise SystemExit(f"apr-dist {arguments[0]} ended with {code}")


def real_gemma(source: Path, folder: Path) -> None:
    """All of it, into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer, shards, run = (folder / name for name in ("gemma.apr", "tokenizer", "shards", "run"))
    import_model(source, model, dtype=DType.F32, overwrite=True)
    command("tokenize", "import-hf", source, "--output", tokenizer, "--force")
    tokens = texts(tokenizer)
    before = our_loss(model, tokens)
    check("loss of the import", before, reference_loss(source, tokens))
    document = folder / "library.jsonl"
    source_text = "".join(inspect.getsource(module) for module in (inspect, json, textwrap, argparse))
    pieces = [source_text[first : first + 2000] for first in range(0, len(source_text), 2000)]
    document.write_text("".join(json.dumps({"text": text}) + "\n" for text in pieces))
    command(
        "tokenize",
        "encode-corpus",
        "--corpus",
        document,
        "--val-fraction",
        0.2,
        "--tokenizer",
        tokenizer,
        "--output",
        shards,
        "--force",
    )
    flags = ["--init", model, "--dataset", shards / "train", "--val-dataset", shards / "validation"]
    flags += ["--tokenizer", tokenizer, "--run-dir", run, "--overwrite", "--num-steps", STEPS]
    flags += ["--batch-size", 2, "--seq-length", 64, "--lr", "1e-5", "--device", "cpu"]
    flags += ["--evaluation.max-sequences", 4]
    if train([str(flag) for flag in flags]):
        raise SystemExit("the run ended with an error")
    trained = our_loss(run / "checkpoint.apr", tokens)
    print(f"loss after {STEPS} steps: {trained:.6f}", flush=True)
    if not trained < before:
        raise SystemExit("training on these texts did not lower their loss")
    command(
        "export",
        run / "checkpoint.apr",
        "--to",
        "gguf",
        "--dtype",
        "f32",
        "-o",
        folder / "out.gguf",
        "--force",
    )
    import_model(folder / "out.gguf", folder / "again.apr", overwrite=True)
    check("loss of the export, opened again", our_loss(folder / "again.apr", tokens), trained)
    check("loss of the export in transformers", reference_loss(folder / "out.gguf", tokens), trained)


if __name__ == "__main__":
    real_gemma(Path(sys.argv[1]), Path(sys.argv[2]))
