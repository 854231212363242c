"""The trainer as people start it: the script under Python, accelerate launch and torchrun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders.runs import TRAIN, metrics, run_script, verdict
from gguf import GGUFReader
from tokenizers import Tokenizer

from apr_dist.apr.reader import AprReader
from apr_dist.cli import main as apr_dist
from apr_dist.corpus.tokenizer import load_tokenizer
from apr_dist.errors import ExitCode

if TYPE_CHECKING:
    from builders.runs import Inputs


def flags(inputs: Inputs, run_dir: Path, *more: str) -> list[str]:
    given = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(run_dir)]
    return [
        *given,
        "--num-steps",
        "4",
        "--eval-every",
        "2",
        "--lr",
        "1e-3",
        "--warmup-steps",
        "1",
        *more,
    ]


@pytest.fixture(scope="module")
def single(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process, started as ``python apr_dist/train.py``."""
    run_dir = tmp_path_factory.mktemp("single") / "run"
    done = run_script(*flags(inputs, run_dir))
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-007")
def test_plain_python_trains_and_prints_every_figure_of_a_step(single: Path, inputs: Inputs) -> None:
    assert verdict(single)["facts"]["strategy"] == "single"
    assert [line["step"] for line in metrics(single)] == [1, 2, 3, 4]


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-002", "FALSIFY-APR-DIST-DISTRIBUTED-005")
def test_two_processes_are_ddp_and_give_the_same_losses(single: Path, inputs: Inputs, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = run_script(*flags(inputs, run_dir, "--parallel.strategy", "ddp"), world_size=2)
    assert done.returncode == 0, done.stderr
    facts = verdict(run_dir)["facts"]
    assert (facts["strategy"], facts["world_size"]) == ("ddp", 2)
    assert "as ddp over 2 process(es)" in done.stdout
    assert "digests equal on 2 rank(s)" in done.stdout
    for alone, together in zip(metrics(single), metrics(run_dir), strict=True):
        assert together["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-6)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)
    for alone, together in zip(metrics(single, "evaluation"), metrics(run_dir, "evaluation"), strict=True):
        assert together["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-6)
        assert together["tokens"] == alone["tokens"]


def test_accelerate_launch_runs_the_same_script(single: Path, inputs: Inputs, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = run_script(*flags(inputs, run_dir), launcher="accelerate")
    assert done.returncode == 0, done.stderr
    losses = [[line["train_loss"] for line in metrics(folder)] for folder in (single, run_dir)]
    assert losses[0] == losses[1]
    with AprReader(run_dir / "checkpoint.apr") as ours, AprReader(single / "checkpoint.apr") as theirs:
        assert all(ours.raw(name) == theirs.raw(name) for name in theirs.tensors)


def test_the_only_process_of_torchrun_is_the_run_of_plain_python(
    single: Path, inputs: Inputs, tmp_path: Path
) -> None:
    """What ``--nproc_per_node 1`` starts, and an elastic job of ``--nnodes 1:2`` shrinks to."""
    run_dir = tmp_path / "run"
    done = run_script(*flags(inputs, run_dir), launcher="torchrun --nproc_per_node 1")
    assert done.returncode == 0, done.stderr
    facts = verdict(run_dir)["facts"]
    assert (facts["strategy"], facts["world_size"]) == ("single", 1)
    losses = [[line["train_loss"] for line in metrics(folder)] for folder in (single, run_dir)]
    assert losses[0] == losses[1]


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-003")
def test_what_rank_0_refuses_every_rank_refuses_together(inputs: Inputs, tmp_path: Path) -> None:
    broken = tmp_path / "broken.apr"
    broken.write_bytes(inputs.pretrained.read_bytes()[:-100])
    run_dir = tmp_path / "run"
    done = run_script(*flags(inputs, run_dir, "--init", str(broken)), world_size=2, timeout_s=120)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "[FALSIFY-APR-DIST-CHECKPOINT-001]" in said[0]
    exits = [line for line in done.stderr.splitlines() if "exitcode" in line]
    assert any(
        f"exitcode  : {int(ExitCode.MODEL_FILE)}" in line or f"exitcode: {int(ExitCode.MODEL_FILE)}" in line
        for line in exits
    ), done.stderr
    assert not run_dir.exists()


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-001")
def test_a_strategy_that_is_not_the_active_one_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    done = run_script(*flags(inputs, tmp_path / "run", "--parallel.strategy", "ddp"))
    assert done.returncode == ExitCode.DISTRIBUTED
    assert "[FALSIFY-APR-DIST-DISTRIBUTED-001]" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_refusal_needs_no_pytorch_and_shows_no_traceback_unless_asked(tmp_path: Path) -> None:
    missing = ("--init", str(tmp_path / "none.apr"))
    plain = run_script(*missing)
    assert plain.returncode == ExitCode.MODEL_FILE
    assert "Traceback" not in plain.stderr
    assert "Traceback" in run_script(*missing, "--debug").stderr


def test_running_as_a_script_shadows_no_library() -> None:
    """The script's own folder holds rooms named like libraries; none may answer for one."""
    rooms = {path.stem for path in TRAIN.parent.iterdir() if path.suffix == ".py" or path.is_dir()}
    probe = (
        "import runpy, sys; sys.argv = ['train.py', '--help']\n"
        f"sys.path[0] = {str(TRAIN.parent)!r}\n"
        "try:\n"
        f"    runpy.run_path({str(TRAIN)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 0\n"
        f"assert {str(TRAIN.parent)!r} not in sys.path\n"
        f"assert not set(sys.modules) & {rooms - {'__init__', '__main__', '__pycache__'}!r}\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


_WHAT_IS_LOADED = """
import sys
from apr_dist.train import main
code = main(sys.argv[1:])
heavy = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy", "triton", "deepspeed")
print("LOADED", *[name for name in heavy if name in sys.modules])
sys.exit(code)
"""


def test_one_process_loads_neither_a_compiler_nor_what_shards(inputs: Inputs, tmp_path: Path) -> None:
    """Each takes most of a second of every start, and none of it is used."""
    command = [sys.executable, "-c", _WHAT_IS_LOADED, *flags(inputs, tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["LOADED"]


@pytest.mark.parametrize(
    "start", [["apr_dist/train.py"], ["-m", "apr_dist.train"], ["-m", "apr_dist", "plan"]]
)
def test_a_checkout_without_the_compiled_loader_names_the_fix(start: list[str], tmp_path: Path) -> None:
    """What ``pip install .`` leaves: the checkout, first on the path, hides the installed package."""
    package = tmp_path / "apr_dist"
    shutil.copytree(TRAIN.parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    clean = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *start], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == ExitCode.USAGE, done.stderr
    assert done.stderr.startswith(f"error: {package}: the compiled loader _rust_loader is missing")
    assert "pip install -e ." in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_from_scratch_leaves_a_checkpoint_with_its_tokenizer(inputs: Inputs, tmp_path: Path) -> None:
    """The exports of the checkpoint have the vocabulary it was trained with."""
    text = (inputs.tokenizer / "tokenizer.json").read_text()
    with AprReader(inputs.pretrained) as reader:
        assert reader.metadata.custom["tokenizer.json"] == text
        assert (
            reader.metadata.custom["tokenizer.eos_token_id"]
            == load_tokenizer(inputs.tokenizer).identity.eos_id
        )
    assert (
        apr_dist(["export", str(inputs.pretrained), "--to", "huggingface", "-o", str(tmp_path / "hf")]) == 0
    )
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == text
    assert apr_dist(["export", str(inputs.pretrained), "--to", "gguf", "-o", str(tmp_path / "m.gguf")]) == 0
    tokens = GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.tokens"]
    vocabulary = Tokenizer.from_file(str(inputs.tokenizer / "tokenizer.json")).get_vocab()
    written = [bytes(tokens.parts[one]).decode() for one in tokens.data]
    assert {token: written.index(token) for token in vocabulary} == vocabulary
