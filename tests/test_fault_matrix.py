"""Every kind of broken input, on one rank and on two, with an init file and without.

Each ends with the id of its falsifier and its documented exit code on every rank, told once, and leaves no
run folder that could be taken for a run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from builders.files import flipped, open_folder, seal, write_apr
from builders.runs import TINY
from builders.tokens import build_tiny_tokenizer
from builders.warm_ranks import Ended, WarmRanks, open_ranks

from apr_dist.apr.layout import DType
from apr_dist.apr.reader import AprReader
from apr_dist.errors import ExitCode

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


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmRanks]:
    server = open_ranks(tmp_path_factory.mktemp("ranks"))
    yield server
    server.close()


@pytest.fixture
def case(inputs: Inputs, tmp_path: Path) -> Iterator[Case]:
    with ExitStack() as stack:
        yield Case(inputs, tmp_path, stack, {"--run-dir": str(tmp_path / "run"), "--num-steps": "0"})


def launched(case: Case, ranks: WarmRanks, world_size: int) -> Ended:
    usual = case.inputs.data_flags()
    given = dict(zip(usual[::2], usual[1::2], strict=True)) | case.flags
    flags = [part for flag, value in given.items() if value for part in (flag, value)]
    return ranks.launch(flags, world_size=world_size, unprivileged=case.unprivileged)


def check_refused(case: Case, ended: Ended, code: ExitCode, falsifier: str | None) -> None:
    """What every refusal has in common."""
    assert ended.codes == (code,) * len(ended.codes), ended.errors
    said = [line for text in ended.errors for line in text.splitlines() if line.startswith("error")]
    assert len(said) == 1, "told once, by rank 0"
    assert falsifier is None or f"[{falsifier}]" in said[0], said[0]
    assert "Traceback" not in "".join(ended.errors)
    run = Path(case.flags["--run-dir"])
    assert not run.exists() or [path.name for path in run.iterdir()] == ["notes.txt"]


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-012", "FALSIFY-APR-DIST-DISTRIBUTED-003")
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("fault", "code", "falsifier"),
    [
        pytest.param(
            "missing",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-004",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-004"),
        ),
        pytest.param(
            "extra",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-006",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-006"),
        ),
        pytest.param(
            "renamed",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-004",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-004"),
        ),
        pytest.param(
            "wrong shape",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-005",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-005"),
        ),
        pytest.param(
            "transposed",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-005",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-005"),
        ),
        pytest.param(
            "NaN",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-007",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-007"),
        ),
        pytest.param(
            "zero",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-007",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-007"),
        ),
        pytest.param(
            "wrong dtype",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-013",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-013"),
        ),
        pytest.param(
            "untied without a head",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-003",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-003"),
        ),
        pytest.param(
            "doubly tied",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-003",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-003"),
        ),
        pytest.param(
            "encoder",
            ExitCode.GATE,
            "FALSIFY-APR-PRETRAIN-ARCH-007",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-007"),
        ),
        pytest.param(
            "unknown family",
            ExitCode.GATE,
            "FALSIFY-APR-PRETRAIN-INIT-005",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-005"),
        ),
        pytest.param(
            "metadata absent",
            ExitCode.GATE,
            "FALSIFY-APR-PRETRAIN-INIT-005",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-005"),
        ),
        pytest.param(
            "metadata contradicting the names",
            ExitCode.GATE,
            "FALSIFY-INIT-ARCH-MATCH-001",
            marks=pytest.mark.falsifies("FALSIFY-INIT-ARCH-MATCH-001"),
        ),
        pytest.param(
            "metadata contradicting the shapes",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-006",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-006"),
        ),
        pytest.param(
            "names of GGUF",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-004",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-004"),
        ),
        pytest.param(
            "truncated",
            ExitCode.MODEL_FILE,
            "FALSIFY-APR-DIST-CHECKPOINT-001",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-001"),
        ),
        pytest.param(
            "bit-flipped",
            ExitCode.MODEL_FILE,
            "FALSIFY-APR-DIST-CHECKPOINT-001",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-001"),
        ),
        pytest.param(
            "empty",
            ExitCode.MODEL_FILE,
            "FALSIFY-APR-PRETRAIN-INIT-004",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-004"),
        ),
        pytest.param(
            "wrong magic",
            ExitCode.MODEL_FILE,
            "FALSIFY-APR-PRETRAIN-INIT-004",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-004"),
        ),
        pytest.param(
            "v1 magic",
            ExitCode.MODEL_FILE,
            "FALSIFY-APR-PRETRAIN-INIT-004",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-004"),
        ),
        pytest.param(
            "directory",
            ExitCode.MODEL_FILE,
            "FALSIFY-APR-PRETRAIN-INIT-003",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-003"),
        ),
        pytest.param(
            "FIFO",
            ExitCode.MODEL_FILE,
            "FALSIFY-APR-PRETRAIN-INIT-003",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-003"),
        ),
        pytest.param(
            "permission denied",
            ExitCode.MODEL_FILE,
            "FALSIFY-APR-PRETRAIN-INIT-003",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-003"),
        ),
        pytest.param(
            "missing file",
            ExitCode.MODEL_FILE,
            "FALSIFY-APR-PRETRAIN-INIT-003",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-003"),
        ),
        pytest.param(
            "oversize tokenizer",
            ExitCode.GATE,
            "FALSIFY-APR-PRETRAIN-ARCH-010",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-010"),
        ),
        pytest.param(
            "wrong tokenizer",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-009",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-009"),
        ),
        pytest.param(
            "held-out shards trained on",
            ExitCode.DATA,
            "FALSIFY-APR-DIST-TRAINER-011",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-011"),
        ),
        pytest.param(
            "a token without a row",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-008",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-008"),
        ),
        pytest.param("manifest a FIFO", ExitCode.DATA, None),
        pytest.param("tokenizer a FIFO", ExitCode.DATA, None),
        pytest.param(
            "occupied run folder",
            ExitCode.OUTPUT,
            "FALSIFY-APR-DIST-CHECKPOINT-003",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-003"),
        ),
    ],
)
def test_with_an_init_every_rank_refuses(
    fault: str,
    code: ExitCode,
    falsifier: str | None,
    world_size: int,
    case: Case,
    ranks: WarmRanks,
    record_property: Callable[[str, object], None],
) -> None:
    case.flags["--init"] = str(case.inputs.pretrained)
    WITH_INIT[fault](case)
    ended = launched(case, ranks, world_size)
    record_property("seconds", ended.seconds)
    check_refused(case, ended, code, falsifier)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("fault", "code", "falsifier"),
    [
        pytest.param(
            "encoder",
            ExitCode.GATE,
            "FALSIFY-APR-PRETRAIN-ARCH-007",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-007"),
        ),
        pytest.param(
            "unknown family",
            ExitCode.GATE,
            "FALSIFY-APR-PRETRAIN-INIT-005",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-005"),
        ),
        pytest.param(
            "metadata absent",
            ExitCode.GATE,
            "FALSIFY-APR-PRETRAIN-INIT-005",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-005"),
        ),
        pytest.param(
            "a dimension absent",
            ExitCode.GATE,
            "FALSIFY-APR-PRETRAIN-INIT-005",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-005"),
        ),
        pytest.param(
            "metadata contradicting itself",
            ExitCode.GATE,
            "FALSIFY-INIT-ARCH-MATCH-001",
            marks=pytest.mark.falsifies("FALSIFY-INIT-ARCH-MATCH-001"),
        ),
        pytest.param(
            "impossible dimension",
            ExitCode.GATE,
            "FALSIFY-APR-PRETRAIN-INIT-005",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-005"),
        ),
        pytest.param(
            "reserved rows",
            ExitCode.GATE,
            "FALSIFY-APR-PRETRAIN-ARCH-006",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-006"),
        ),
        pytest.param(
            "oversize tokenizer",
            ExitCode.GATE,
            "FALSIFY-APR-PRETRAIN-ARCH-006",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-006"),
        ),
        pytest.param(
            "wrong tokenizer",
            ExitCode.GATE,
            "FALSIFY-APR-PRETRAIN-ARCH-006",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-006"),
        ),
        pytest.param("empty", ExitCode.USAGE, None),
        pytest.param("directory", ExitCode.USAGE, None),
        pytest.param("FIFO", ExitCode.USAGE, None),
        pytest.param("permission denied", ExitCode.USAGE, None),
        pytest.param(
            "held-out shards trained on",
            ExitCode.DATA,
            "FALSIFY-APR-DIST-TRAINER-011",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-011"),
        ),
        pytest.param(
            "a token without a row",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-008",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-008"),
        ),
        pytest.param(
            "no data", ExitCode.USAGE, "INV-TRAIN-010", marks=pytest.mark.falsifies("INV-TRAIN-010")
        ),
        pytest.param(
            "occupied run folder",
            ExitCode.OUTPUT,
            "FALSIFY-APR-DIST-CHECKPOINT-003",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-003"),
        ),
    ],
)
def test_from_scratch_every_rank_refuses(
    fault: str,
    code: ExitCode,
    falsifier: str | None,
    world_size: int,
    case: Case,
    ranks: WarmRanks,
    record_property: Callable[[str, object], None],
) -> None:
    case.flags |= {"--mode": "from-scratch", "--model": str(case.inputs.model)}
    FROM_SCRATCH[fault](case)
    ended = launched(case, ranks, world_size)
    record_property("seconds", ended.seconds)
    check_refused(case, ended, code, falsifier)


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-009")
@pytest.mark.parametrize("world_size", [1, 2])
def test_reserved_rows_and_a_copied_head_are_trained(world_size: int, case: Case, ranks: WarmRanks) -> None:
    """The two kinds of file that look broken and are not."""

    def grow(arrays: Arrays, metadata: dict[str, Any]) -> None:
        arrays[EMBEDDING] = np.concatenate([arrays[EMBEDDING], arrays[EMBEDDING][:8]])
        arrays["lm_head.weight"] = arrays[EMBEDDING]
        metadata["vocab_size"] = 520

    case.model(grow)
    ended = launched(case, ranks, world_size)
    assert ended.codes == (0,) * world_size, ended.errors
    with AprReader(Path(case.flags["--run-dir"]) / "checkpoint.apr") as saved:
        assert saved.tensors[EMBEDDING].shape[0] == 520
        assert "lm_head.weight" not in saved.tensors
