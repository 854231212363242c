"""Commands of the documentation: found in its pages, and a folder in which they can be run.

A block of ``console`` holds commands after ``$ ``, carried on while a line ends in a backslash, and what they
print; a block of ``bash`` is a script. A comment on the line before a block says what is special about it:
``<!-- not run: WHY -->`` or ``<!-- ends with: EXIT CODE -->``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import save_file

from apr_dist.cli import main
from builders.models import random_weights, tiny_config
from builders.runs import REPOSITORY, TINY, Inputs, once, run_here
from builders.tokens import small_sources, write_jsonl

PAGES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md")))

_BLOCK = re.compile(
    r"(?:^<!-- (?P<note>[^\n]*?) -->\n)?^```(?P<language>console|bash|sh|shell)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_SHORTER = {"num_steps": 4, "eval_every": 2, "seq_length": 64}
"""What ``configs/demo.yaml`` says here: the model of the tests is small, and never saw longer sequences."""

_COMMAND = re.compile(
    r"^\s*\$? ?((?:[A-Z_]+=\S+ )*"
    r"(?:apr-dist|python3?|accelerate|torchrun|make|pip|pytest|cargo|sbatch) [^\n]*)$",
    re.MULTILINE,
)
_ANY_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """Commands of one block.

    Attributes:
        line: where in the page it begins.
        script: the commands as Bash reads them.
        exit_code: what the last one has to end with.
        not_run: why it is not run here; empty when it is.
    """

    line: int
    script: str
    exit_code: int
    not_run: str


def blocks(page: Path) -> Iterator[Block]:
    """The command blocks of a page, in order."""
    text = page.read_text()
    for match in _BLOCK.finditer(text):
        kind, _, value = (match["note"] or "").partition(": ")
        yield Block(
            line=text.count("\n", 0, match.start("language")) + 1,
            script=match["text"] if match["language"] == "bash" else _typed(match["text"]),
            exit_code=int(value) if kind == "ends with" else 0,
            not_run=value if kind == "not run" else "",
        )


def unmarked_commands(page: Path) -> list[str]:
    """Lines that look like commands of ours and stand where no test would find them."""
    text = page.read_text()
    outside = _BLOCK.sub("", text)
    fenced = "\n".join(body for language, body in _ANY_BLOCK.findall(outside) if language in ("", "text"))
    indented = "\n".join(line for line in outside.splitlines() if line.startswith("    "))
    return [match[1] for match in _COMMAND.finditer(f"{fenced}\n{indented}")]


def _typed(text: str) -> str:
    commands, carried_on = [], False
    for line in text.splitlines():
        if line.startswith("$ ") or carried_on:
            commands.append(line.removeprefix("$ "))
            carried_on = line.endswith("\\")
    return "\n".join(commands) + "\n"


def run(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a block as typed into Bash, in a folder; it stops at the first command that fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "COLUMNS": "100"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["PYTHONPATH"] = str(REPOSITORY)
    return subprocess.run(
        ["bash", "-c", f"set -eo pipefail\n{block.script}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def make_folder(folder: Path, inputs: Inputs, shared: Path, *, from_nothing: bool) -> Path:
    """What a page may count on: the checkout's folders, a model in three formats, text, shards, two runs.

    From nothing, a page makes all of that itself of a GGUF and a folder of text.
    """
    ready = once(shared / "pages", lambda made: _fill(made, inputs))
    for path in ready.iterdir():
        if from_nothing and path.name not in ("model.gguf", "corpus"):
            continue
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        elif not path.name.startswith("."):
            shutil.copy(path, folder / path.name)
    for name in ("apr_dist", "benchmarks", "contracts", "launch", "tests"):
        (folder / name).symlink_to(REPOSITORY / name)
    shutil.copytree(REPOSITORY / "configs", folder / "configs")
    demo = folder / "configs" / "demo.yaml"
    text = demo.read_text()
    for key, value in _SHORTER.items():
        text, found = re.subn(rf"^{key}: \d+$", f"{key}: {value}", text, flags=re.MULTILINE)
        assert found == 1, key
    demo.write_text(text)
    return folder


def _fill(folder: Path, inputs: Inputs) -> None:
    model = str(folder / "model.apr")
    trained = folder / "runs" / "first"
    flags = [
        "--init",
        str(inputs.pretrained),
        "--run-dir",
        str(trained),
        "--seq-length",
        "64",
        "--lr",
        "5e-3",
    ]
    flags += ["--num-steps", "80", "--eval-every", "80", "--batch-size", "16", "--warmup-steps", "5"]
    assert run_here(*inputs.data_flags(), *flags) == 0
    shutil.copytree(trained, folder / "runs" / "second")
    best = str(trained / "checkpoint.apr")
    shutil.copy(best, model)  # its tokenizer is inside
    shutil.copytree(inputs.tokenizer, folder / "model.tokenizer")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    assert main(["export", model, "--to", "gguf", "-o", str(folder / "model.gguf")]) == 0
    huggingface_model(folder / "huggingface-model")
    corpus = folder / "corpus"
    corpus.mkdir()
    texts = []
    for number, source in enumerate(small_sources(120)):
        shutil.copy(source, corpus / f"{number:03}-{source.name}")
        texts.append(source.read_text(encoding="utf-8", errors="replace"))
    write_jsonl(folder / "notes.jsonl", texts, key="text")
    shutil.copytree(inputs.train.parent, folder / "shards")


def huggingface_model(folder: Path) -> None:
    """A small Llama as Hugging Face lays it out: config.json and model.safetensors."""
    config = tiny_config()
    folder.mkdir()
    save_file(random_weights(config), folder / "model.safetensors", metadata={"format": "pt"})
    described = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    (folder / "config.json").write_text(json.dumps(described))
