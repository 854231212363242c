"""Real runs of the trainer, small enough for a suite: shared inputs, and entry points to call."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apr_dist.parallel.runtime import reset_state
from apr_dist.runs import saved_state
from apr_dist.runs.folder import RunFolder
from apr_dist.train import main
from builders.tokens import build_tiny_dataset, build_tiny_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = REPOSITORY / "apr_dist" / "train.py"
VOCABULARY = 512

TINY = {
    "architecture": "qwen2",
    "hf_architecture": "Qwen2ForCausalLM",
    "hf_model_type": "qwen2",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
"""Architecture keys of a model that trains in milliseconds a step."""


@dataclass(frozen=True)
class Inputs:
    """What every run starts from; made once for all tests, never changed by one.

    Attributes:
        tokenizer: a tokenizer folder of 512 tokens.
        train: folder of training shards.
        validation: folder of held-out shards.
        model: JSON file of the architecture keys ``TINY``.
        pretrained: APR file of that model after 250 steps from scratch.
        pretrained_run: the run folder it came from.
    """

    tokenizer: Path
    train: Path
    validation: Path
    model: Path
    pretrained: Path
    pretrained_run: Path

    def data_flags(self) -> list[str]:
        """Flags that name data and tokenizer, and sizes that fit them."""
        flags = ["--dataset", str(self.train), "--val-dataset", str(self.validation)]
        flags += ["--tokenizer", str(self.tokenizer), "--seq-length", "32", "--batch-size", "4"]
        return [*flags, "--evaluation.max-sequences", "16", "--device", "cpu", "--parallel.cpu-threads", "1"]


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Let the first process that asks make ``folder``; the others wait for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / ".done"
        if not done.exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            done.touch()
    return folder


def make_inputs(root: Path) -> Inputs:
    """The shared inputs under ``root``, training the pretrained model if nobody has yet."""
    data = once(root / "inputs", _make_data)
    inputs = Inputs(
        tokenizer=data / "tokenizer",
        train=data / "dataset" / "train",
        validation=data / "dataset" / "validation",
        model=data / "tiny.json",
        pretrained=root / "pretrained" / "run" / "checkpoint.apr",
        pretrained_run=root / "pretrained" / "run",
    )
    once(root / "pretrained", lambda folder: _pretrain(inputs, folder / "run"))
    return inputs


def run_here(*flags: str) -> int:
    """Train in this process, through the same ``main`` the script has; returns the exit code."""
    reset_state()
    try:
        return main(list(flags))
    finally:
        reset_state()


def run_script(
    *flags: str, world_size: int = 1, launcher: str = "torchrun", timeout_s: float = 240
) -> subprocess.CompletedProcess[str]:
    """Train as a user does: the script under Python, torchrun or accelerate launch.

    ``torchrun`` starts one process with Python alone; ``torchrun --nproc_per_node 1`` does not.
    """
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable]
    if launcher == "accelerate":
        command += ["-m", "accelerate.commands.launch"]
        environment.pop("ACCELERATE_USE_CPU")
    elif launcher != "torchrun" or world_size > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(world_size)]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    return subprocess.run(
        [*command, str(TRAIN), *flags],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def metrics(run_dir: Path, kind: str = "step") -> list[dict[str, Any]]:
    """The lines of one kind of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def whole_folders(run_dir: Path) -> list[Path]:
    """The finished step folders of a run, oldest first."""
    return [folder.path for folder in RunFolder(run_dir).whole()]


def newest_whole(run_dir: Path) -> Path | None:
    """The step folder that a run would resume."""
    found = saved_state.newest_whole(RunFolder(run_dir))
    return found.path if found else None


def verdict(run_dir: Path) -> dict[str, Any]:
    """A run's verdict.json."""
    found: dict[str, Any] = json.loads((run_dir / "verdict.json").read_text())
    return found


def _make_data(folder: Path) -> None:
    tokenizer = build_tiny_tokenizer(folder / "tokenizer", vocab_size=VOCABULARY)
    build_tiny_dataset(folder / "dataset", tokenizer, files=150, shard_tokens=50_000)
    (folder / "tiny.json").write_text(json.dumps(TINY))


def _pretrain(inputs: Inputs, run_dir: Path) -> None:
    code = run_here(
        *inputs.data_flags(),
        *("--mode", "from-scratch", "--model", str(inputs.model), "--run-dir", str(run_dir)),
        *("--num-steps", "250", "--eval-every", "250", "--batch-size", "16", "--seq-length", "64"),
        *("--lr", "1e-2", "--warmup-steps", "10", "--seed", "7"),
    )
    assert code == 0, "the shared pretrained model could not be trained"
