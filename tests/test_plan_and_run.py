"""A plan and a run are refused for the same reasons in the same words, and warn of the same things."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders.runs import run_here

from apr_dist.cli import main

if TYPE_CHECKING:
    from builders.runs import Inputs

INIT = ("--init", "{init}")
BF16 = ("--parallel.precision", "bf16")

REFUSED: dict[str, tuple[int, tuple[str, ...], str]] = {
    "one process keeps its parameters": (
        1,
        (*INIT, "--parallel.offload", "optimizer+parameters"),
        "parallel.offload is optimizer+parameters under strategy single",
    ),
    "ddp has nothing to offload": (
        2,
        (*INIT, "--parallel.strategy", "ddp", "--parallel.offload", "optimizer+parameters"),
        "parallel.offload is optimizer+parameters under strategy ddp",
    ),
    "two processes are ddp by themselves": (
        2,
        (*INIT, "--parallel.offload", "optimizer+parameters"),
        "parallel.offload is optimizer+parameters under strategy ddp",
    ),
    "zero1 keeps its parameters": (
        2,
        (*INIT, "--parallel.strategy", "zero1", "--parallel.offload", "optimizer+parameters"),
        "parallel.offload is optimizer+parameters under strategy zero1",
    ),
    "ddp of one process": (1, (*INIT, "--parallel.strategy", "ddp"), "strategy ddp over 1 process(es)"),
    "fsdp2 of one process": (1, (*INIT, "--parallel.strategy", "fsdp2"), "strategy fsdp2 over 1 process(es)"),
    "single of two processes": (
        2,
        (*INIT, "--parallel.strategy", "single"),
        "strategy single over 2 process(es)",
    ),
    "a shard size without hsdp": (
        2,
        (*INIT, "--parallel.shard-size", "2"),
        "parallel.shard_size is 2 under strategy ddp",
    ),
    "a shard size that does not divide": (
        2,
        (*INIT, "--parallel.strategy", "hsdp", "--parallel.shard-size", "3"),
        "2 processes do not divide into groups of 3",
    ),
    "8 bits under zero2": (
        2,
        (*INIT, "--parallel.strategy", "zero2", "--optimizer.state-bits", "8"),
        "optimizer.state_bits is 8 under strategy zero2",
    ),
    "losses of routers of a dense model": (
        1,
        (*INIT, "--router.aux-loss", "0.01"),
        "router.aux_loss and router.z_loss are for mixtures of experts, and this model is dense",
    ),
    "split weights in f32": (
        1,
        (*INIT, "--memory.weights", "split"),
        "memory.weights is split and parallel.precision is f32",
    ),
    "split weights under zero1": (
        2,
        (*INIT, *BF16, "--parallel.strategy", "zero1", "--memory.weights", "split"),
        "memory.weights is split under strategy zero1, whose engine keeps f32 masters of its own",
    ),
    "bf16 gradients under zero3": (
        2,
        (*INIT, *BF16, "--parallel.strategy", "zero3", "--memory.gradients", "bf16"),
        "memory.gradients is bf16 under strategy zero3",
    ),
    "bf16 gradients under fsdp2": (
        2,
        (*INIT, *BF16, "--parallel.strategy", "fsdp2", "--memory.gradients", "bf16"),
        "memory.gradients is bf16 under strategy fsdp2",
    ),
    "split weights that are offloaded under fsdp2": (
        2,
        (
            *(*INIT, *BF16, "--parallel.strategy", "fsdp2", "--memory.weights", "split"),
            *("--parallel.offload", "optimizer+parameters"),
        ),
        "memory.weights is split under strategy fsdp2 with optimizer+parameters offloaded",
    ),
    "compiled blocks whose inputs leave": (
        1,
        (*INIT, "--compute.activation-checkpointing", "full-offload", "--compute.compile", "block"),
        "full-offload and --compute.compile block do not go together",
    ),
    "a decay of another schedule": (
        1,
        (*INIT, "--optimizer.decay-steps", "2"),
        "optimizer.decay_steps is 2 with schedule cosine",
    ),
    "a decay that leaves no room": (
        1,
        (*INIT, "--optimizer.schedule", "wsd", "--optimizer.decay-steps", "3", "--warmup-steps", "1"),
        "optimizer.decay_steps is 3 with schedule wsd",
    ),
    "a batch that does not divide": (
        1,
        (*INIT, "--batch-size", "7", "--micro-batch-size", "2"),
        "use --batch-size 6 or 8, or change --micro-batch-size",
    ),
    "two architectures": (1, (*INIT, "--model", "qwen2.5-7b"), "both name an architecture"),
    "no such model": (1, ("--mode", "from-scratch", "--model", "llama-9t"), "llama-9t"),
    "documents that are compiled": (
        1,
        (*INIT, "--loader.documents", "isolate", "--compute.compile", "block"),
        "--loader.documents isolate and --compute.compile block do not go together",
    ),
    "kernels of another device": (
        1,
        (*INIT, "--compute.kernels", "cuda", "--device", "cpu"),
        "compute.kernels is cuda, which does not run on cpu",
    ),
    "kernels that cannot be compiled": (
        1,
        (*INIT, "--compute.kernels", "cpu", "--compute.compile", "block", "--device", "cpu"),
        "compute.kernels is cpu, which does not run on cpu in compiled blocks",
    ),
    "kernels that need a GPU, on a machine without": (
        1,
        (*INIT, "--compute.kernels", "cuda"),
        "compute.kernels is cuda, which does not run on cpu. Expected auto or plain or cpu",
    ),
    "longer than the model": (1, (*INIT, "--seq-length", "100000"), "is more than the model's"),
    "a tracker that is not installed": (
        1,
        (*INIT, "--track", "dvclive"),
        "the tracker dvclive is not installed",
    ),
    "an id that the model has not": (
        1,
        (*INIT, "--loader.ignored-ids", "999999"),
        "ignored_ids names 999,999",
    ),
    "an occupied folder": (1, (*INIT, "--run-dir", "{occupied}"), "already holds files"),
}


@pytest.mark.parametrize(("processes", "flags", "words"), REFUSED.values(), ids=REFUSED)
def test_a_plan_is_refused_as_the_run_is(
    processes: int,
    flags: tuple[str, ...],
    words: str,
    inputs: Inputs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = {"init": inputs.pretrained, "occupied": inputs.train}
    given = [*inputs.data_flags(), "--run-dir", str(tmp_path / "run"), "--num-steps", "3"]
    given += [flag.format(**places) for flag in flags]
    planned = main(["plan", *given, "--processes", str(processes), "--json"])
    said = capsys.readouterr()
    refusal = json.loads(said.out)["refusal"] if said.out else said.err.removeprefix("error: ").strip()
    for name, value in (("WORLD_SIZE", processes), ("RANK", 0), ("LOCAL_WORLD_SIZE", processes)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert run_here(*given) == planned != 0
    error = capsys.readouterr().err
    assert words in error
    assert refusal in error
    assert words in refusal
    assert not (tmp_path / "run").exists()


WARNED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "a short run of pretrained weights": (
        (*INIT, "--mode", "from-scratch", "--lr", "1e-3", "--warmup-steps", "9", "--eval-every", "5"),
        (
            "lr 0.001 is high for pretrained weights",
            "--mode from-scratch with --init",
            "warm-up of 9 steps does not end within 2: lr reaches 2.2e-04, never 0.001",
            "eval_every 5 is above num_steps",
            "too few to tell small gains from noise",
        ),
    ),
    "a run from scratch": (
        ("--mode", "from-scratch", "--model", "{model}", "--warmup-steps", "0"),
        ("UNDER-TRAINED: 2 steps x 4 x 32 = 256 tokens",),
    ),
    "a dropout that is not applied": (
        ("--init", "{dropout}", "--seq-length", "16"),
        (
            "the model's configuration states attention_dropout 0.3, which is left out: training applies no"
            " dropout",
        ),
    ),
    "more passes than allowed": (
        (
            *INIT,
            "--num-steps",
            "900",
            "--batch-size",
            "512",
            "--loader.max-epochs",
            "1",
            "--eval-every",
            "900",
        ),
        ("the run will stop with StreamExhausted",),
    ),
}


@pytest.mark.parametrize(("flags", "words"), WARNED.values(), ids=WARNED)
def test_a_run_warns_of_what_its_plan_warns_of(
    flags: tuple[str, ...],
    words: tuple[str, ...],
    inputs: Inputs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"init": inputs.pretrained, "model": inputs.model, "dropout": tmp_path / "dropout.apr"}
    if "{dropout}" in flags:
        folder = tmp_path / "folder"
        assert main(["export", str(inputs.pretrained), "--to", "huggingface", "-o", str(folder)]) == 0
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.3}))
        assert main(["import", str(folder), "-o", str(places["dropout"])]) == 0
        assert "attention_dropout is left out" in " ".join(capsys.readouterr())
    given = [*inputs.data_flags(), "--run-dir", str(tmp_path / "run"), "--num-steps", "2"]
    given += [flag.format(**places) for flag in flags]
    assert main(["plan", *given, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["warnings"]
    for one in words:
        assert any(one in warning for warning in planned), planned
    run_here(*given)
    before_steps = capsys.readouterr().out.split("running on")[0]
    assert re.findall(r"^warning: (.*)$", before_steps, re.MULTILINE) == planned
