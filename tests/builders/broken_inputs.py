"""Every kind of broken input: what is changed of a good launch, by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apr_dist.apr.layout import DType
from apr_dist.apr.reader import AprReader
from builders.files import flipped, open_folder, seal, write_apr
from builders.runs import TINY
from builders.tokens import build_tiny_tokenizer

if TYPE_CHECKING:
    from builders.runs import Inputs

Arrays = dict[str, np.ndarray[Any, Any]]
Q0 = "model.layers.0.self_attn.q_proj.weight"
K0 = "model.layers.0.self_attn.k_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@dataclass
class Case:
    """One launch to be: where it may write, and the flags that are not the usual ones."""

    inputs: Inputs
    folder: Path
    stack: ExitStack
    flags: dict[str, str] = field(default_factory=dict)
    unprivileged: bool = False

    def model(self, change: Callable[[Arrays, dict[str, Any]], Any]) -> None:
        """Start from the pretrained model after a change of its tensors or metadata."""
        with AprReader(self.inputs.pretrained) as reader:
            arrays = {name: reader.float32(name).copy() for name in reader.tensors}
            metadata = reader.metadata.to_mapping()
        change(arrays, metadata)
        self.flags["--init"] = str(write_apr(self.folder / "broken.apr", arrays, metadata))

    def file(self, change: Callable[[bytes], bytes]) -> None:
        """Start from the pretrained model's file after a change of its bytes."""
        path = self.folder / "broken.apr"
        path.write_bytes(change(self.inputs.pretrained.read_bytes()))
        self.flags["--init"] = str(path)

    def architecture(self, **keys: Any) -> None:
        """Start from random weights of an architecture with other keys; None removes one."""
        wanted = {key: value for key, value in (TINY | keys).items() if value is not None}
        path = self.folder / "model.json"
        path.write_text(json.dumps(wanted))
        self.flags["--model"] = str(path)

    def tokenizer(self, size: int) -> None:
        """Come with a tokenizer of another size."""
        self.flags["--tokenizer"] = str(build_tiny_tokenizer(self.folder / "tokenizer", vocab_size=size))

    def tokenizer_file(self, change: Callable[[Path], Any]) -> None:
        """Come with a tokenizer after a change of its file."""
        self.tokenizer(512)
        change(self.folder / "tokenizer" / "tokenizer.json")

    def shards(self, change: Callable[[Path], Any]) -> None:
        """Train on shards after a change of their folder."""
        folder = self.folder / "dataset"
        shutil.copytree(self.inputs.train, folder)
        change(folder)
        self.flags["--dataset"] = str(folder)

    def strange(self, name: str, flag: str, make: Callable[[Path], Any]) -> None:
        """Give a flag a path that is no regular file."""
        path = self.folder / name
        make(path)
        self.flags[flag] = str(path)

    def forbidden(self, name: str, flag: str) -> None:
        """Give a flag a file that may not be read."""
        folder = self.stack.enter_context(open_folder())
        path = folder / name
        path.write_bytes(self.inputs.pretrained.read_bytes())
        path.chmod(0)
        self.flags |= {flag: str(path), "--run-dir": str(folder / "run")}
        self.unprivileged = True


Fault = Callable[[Case], Any]


def renamed(arrays: Arrays, change: Callable[[str], str]) -> None:
    for name in list(arrays):
        arrays[change(name)] = arrays.pop(name)


def raise_largest_id(folder: Path) -> None:
    path = folder / "manifest.json"
    recorded = json.loads(path.read_text())
    recorded["shards"][0]["max_id"] = 512
    path.write_text(json.dumps(recorded))


def integers(content: bytes) -> bytes:
    """The file with one tensor declared to hold 32-bit integers, its checksum right."""
    code = content.index(Q0.encode()) + len(Q0)
    assert content[code] == DType.F32
    return seal(content[:code] + bytes([DType.I32]) + content[code + 1 : -4])


def occupy(case: Case) -> None:
    run = case.folder / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")


def become_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


ENCODER = {"architecture": "bert", "hf_architecture": "BertModel", "hf_model_type": "bert"}
LLAMA = {"architecture": "llama", "hf_architecture": "LlamaForCausalLM", "hf_model_type": "llama"}
UNKNOWN = {"architecture": "zebra", "hf_architecture": "ZebraForCausalLM", "hf_model_type": "zebra"}
DIMENSIONS = ("hidden_size", "num_layers", "num_heads", "intermediate_size", "vocab_size")

WITH_INIT: dict[str, Fault] = {
    "missing": lambda case: case.model(lambda t, m: t.pop(Q0)),
    "extra": lambda case: case.model(lambda t, m: t.update({"adapter.weight": t[Q0]})),
    "renamed": lambda case: case.model(lambda t, m: t.update({Q0 + "2": t.pop(Q0)})),
    "wrong shape": lambda case: case.model(lambda t, m: t.update({Q0: t[Q0][:-1]})),
    "transposed": lambda case: case.model(lambda t, m: t.update({K0: t[K0].T.copy()})),
    "NaN": lambda case: case.model(lambda t, m: t[Q0].__setitem__((0, 0), np.nan)),
    "zero": lambda case: case.model(lambda t, m: t[Q0].fill(0)),
    "untied without a head": lambda case: case.model(lambda t, m: m.update(tie_word_embeddings=False)),
    "doubly tied": lambda case: case.model(lambda t, m: t.update({"lm_head.weight": t[EMBEDDING] + 1})),
    "encoder": lambda case: case.model(lambda t, m: m.update(ENCODER)),
    "unknown family": lambda case: case.model(
        lambda t, m: (m.update(UNKNOWN), renamed(t, lambda name: name.replace("model.layers", "stripes")))
    ),
    "metadata absent": lambda case: case.model(lambda t, m: [m.pop(key, None) for key in DIMENSIONS]),
    "metadata contradicting the names": lambda case: case.model(lambda t, m: m.update(LLAMA)),
    "metadata contradicting the shapes": lambda case: case.model(lambda t, m: m.update(num_layers=1)),
    "names of GGUF": lambda case: case.model(
        lambda t, m: renamed(t, lambda name: name.replace("model.layers.", "blk."))
    ),
    "wrong dtype": lambda case: case.file(integers),
    "truncated": lambda case: case.file(lambda content: content[:-1000]),
    "bit-flipped": lambda case: case.file(lambda content: flipped(content, len(content) // 2, 1)),
    "empty": lambda case: case.file(lambda content: b""),
    "wrong magic": lambda case: case.file(lambda content: b"GGUF" + content[4:]),
    "v1 magic": lambda case: case.file(lambda content: b"APRN" + content[4:]),
    "directory": lambda case: case.strange("broken.apr", "--init", Path.mkdir),
    "FIFO": lambda case: case.strange("broken.apr", "--init", os.mkfifo),
    "permission denied": lambda case: case.forbidden("broken.apr", "--init"),
    "missing file": lambda case: case.strange("none.apr", "--init", lambda path: None),
    "oversize tokenizer": lambda case: case.tokenizer(513),
    "wrong tokenizer": lambda case: case.tokenizer(511),
    "held-out shards trained on": lambda case: case.flags.update({"--val-dataset": str(case.inputs.train)}),
    "a token without a row": lambda case: case.shards(raise_largest_id),
    "manifest a FIFO": lambda case: case.shards(lambda folder: become_fifo(folder / "manifest.json")),
    "tokenizer a FIFO": lambda case: case.tokenizer_file(become_fifo),
    "occupied run folder": occupy,
}
FROM_SCRATCH: dict[str, Fault] = {
    "encoder": lambda case: case.architecture(**ENCODER),
    "unknown family": lambda case: case.architecture(**UNKNOWN),
    "metadata absent": lambda case: case.architecture(**dict.fromkeys(TINY)),
    "a dimension absent": lambda case: case.architecture(hidden_size=None),
    "metadata contradicting itself": lambda case: case.architecture(**LLAMA | {"architecture": "qwen2"}),
    "impossible dimension": lambda case: case.architecture(num_kv_heads=3),
    "reserved rows": lambda case: case.architecture(vocab_size=520),
    "oversize tokenizer": lambda case: case.tokenizer(513),
    "wrong tokenizer": lambda case: case.tokenizer(511),
    "empty": lambda case: case.strange("model.json", "--model", Path.touch),
    "directory": lambda case: case.strange("model.json", "--model", Path.mkdir),
    "FIFO": lambda case: case.strange("model.json", "--model", os.mkfifo),
    "permission denied": lambda case: case.forbidden("model.json", "--model"),
    "held-out shards trained on": lambda case: case.flags.update({"--val-dataset": str(case.inputs.train)}),
    "a token without a row": lambda case: case.shards(raise_largest_id),
    "no data": lambda case: case.flags.update({"--dataset": ""}),
    "occupied run folder": occupy,
}
