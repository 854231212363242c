"""The plan of a run: its memory, its arithmetic, its gates and its warnings."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders.files import write_apr
from builders.models import random_weights, tiny_config
from builders.people import LiveBytes, decoder_config, peak_bytes, two_steps
from builders.runs import REPOSITORY, TINY, Inputs, run_here

from apr_dist.choices import ActivationCheckpointing, Precision, Strategy, StrategyChoice
from apr_dist.cli import main
from apr_dist.cli.plan import plan as plan_verb
from apr_dist.config import TrainConfig, flag_of, leaves
from apr_dist.config.reading import validate
from apr_dist.errors import ModelFileError, UsageError
from apr_dist.gates.warnings import under_trained
from apr_dist.model.config import PRESETS
from apr_dist.planning import memory, plan
from apr_dist.planning.activations import Load
from apr_dist.planning.memory import estimate
from apr_dist.planning.plan import Rate, make_plan
from apr_dist.planning.plan_text import lr_plot, plan_lines

SMALL = {"hidden_size": 128, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 384}


def load(**values: object) -> Load:
    """One process on CPU in f32, but for what is given."""
    usual = {"micro_batch": 2, "seq_length": 64, "accumulates": False, "cuda": False}
    return Load(**{**usual, "precision": Precision.F32, **values})  # type: ignore[arg-type]


def single(model: object, one: Load) -> memory.Memory:
    """The estimate for one process."""
    return estimate(model, one, strategy=Strategy.SINGLE, world_size=1, shard_size=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sizes", "one"),
    [
        ({"vocab_size": 512, "num_layers": 4}, load(micro_batch=8, seq_length=128)),
        ({"vocab_size": 512, "num_layers": 4}, load(micro_batch=8, seq_length=128, accumulates=True)),
        ({"vocab_size": 8192, "num_layers": 2}, load(micro_batch=1, seq_length=32)),
        (
            {"vocab_size": 512, "num_layers": 8},
            load(micro_batch=8, seq_length=128, checkpointing=ActivationCheckpointing.FULL),
        ),
        (
            {"vocab_size": 512, "num_layers": 8},
            load(micro_batch=8, seq_length=128, checkpointing=ActivationCheckpointing.SELECTIVE),
        ),
    ],
    ids=["activations", "accumulation", "weights", "checkpointed", "selectively"],
)
def test_the_estimate_is_what_a_step_really_holds(sizes: dict[str, int], one: Load) -> None:
    model = decoder_config(**SMALL, **sizes)
    with LiveBytes() as live:
        two_steps(model, one)
    assert single(model, one).tensors == pytest.approx(live.peak, rel=0.1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_the_estimate_is_what_a_real_run_takes_over_a_bare_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = {"vocab_size": 4096, "hidden_size": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 4}
    architectures = {"bare": TINY, "full": {**TINY, **wide, "head_dim": 64, "intermediate_size": 1536}}
    runs = []
    for name, keys in architectures.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(keys))
        flags = ["--synthetic", "--mode", "from-scratch", "--model", str(tmp_path / f"{name}.json")]
        flags += [
            "--run-dir",
            str(tmp_path / name),
            "--num-steps",
            "3",
            "--batch-size",
            "2",
            "--seq-length",
            "128",
        ]
        runs.append(
            [*flags, "--evaluation.max-sequences", "2", "--device", "cpu", "--parallel.cpu-threads", "1"]
        )
    assert plan_verb([*runs[1], "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["memory_bytes"]["single"]
    bare, full = peak_bytes(*runs)
    assert planned["weights"] > 100 * 10**6
    assert planned["total"] == pytest.approx(full - bare, rel=0.1)


def test_sharding_cuts_the_state_and_ddp_adds_its_buckets() -> None:
    model = PRESETS["qwen2.5-7b"]
    one = load(cuda=True, precision=Precision.BF16)
    by = {s: estimate(model, one, strategy=s, world_size=8, shard_size=4) for s in Strategy}
    whole = 4 * model.parameter_count()
    assert by[Strategy.DDP].buckets == whole
    assert by[Strategy.DDP].gradients == 0
    assert by[Strategy.ZERO1].optimizer == 2 * whole // 8
    assert by[Strategy.FSDP2].optimizer == 2 * whole // 8
    assert by[Strategy.HSDP].optimizer == 2 * whole // 4
    order = [Strategy.DDP, Strategy.ZERO1, Strategy.ZERO2, Strategy.FSDP2]
    totals = [by[s].total for s in order]
    assert totals == sorted(totals, reverse=True)


def test_a_plan_of_a_real_run_names_its_gates_and_counts_its_passes(inputs: Inputs, tmp_path: Path) -> None:
    made = make_plan(
        validate(config_of(inputs, tmp_path), where="test"), world_size=1, rate=Rate(tokens_per_s=1000)
    )
    assert made.refusal is None
    assert made.wall_s == pytest.approx(made.tokens / 1000)
    text = " ".join(" ".join(plan_lines(made)).split())  # wherever a line of a long path breaks
    assert "FALSIFY-APR-DIST-TRAINER-008" in text or "shards fit the model" in text
    assert "sequences held out" in text
    assert not (tmp_path / "run").exists()


def test_a_gate_that_says_no_is_in_the_plan_with_its_exit_code(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--init", str(inputs.pretrained), "--seq-length", "32", "--batch-size", "4"]
    code = plan_verb([*flags, "--run-dir", str(tmp_path / "run"), "--dataset", str(inputs.train)])
    out = capsys.readouterr().out
    assert code == 2
    assert "NO    [INV-TRAIN-010]" in out
    assert "parameters" in out


def test_an_init_that_is_not_there_cannot_be_planned(tmp_path: Path) -> None:
    config = TrainConfig(init=tmp_path / "none.apr", synthetic=True)
    with pytest.raises(ModelFileError):
        make_plan(config, world_size=1, rate=Rate())


def test_a_missing_init_is_one_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--init", "/nope.apr", "--synthetic"]) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: [FALSIFY-APR-PRETRAIN-INIT-003] /nope.apr: there is no such file.")


def test_the_plan_reads_no_weights_and_says_what_it_left_out(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray(inputs.pretrained.read_bytes())
    content[-4096] ^= 0xFF  # in the last tensor
    damaged = tmp_path / "damaged.apr"
    damaged.write_bytes(content)
    flags = ["--init", str(damaged), *inputs.data_flags(), "--run-dir", str(tmp_path / "run")]
    assert plan_verb(flags) == 0
    assert "later: checksums and every value of the init" in capsys.readouterr().out
    assert run_here(*flags, "--num-steps", "1") == 3


def test_a_head_beside_its_equal_embedding_is_a_tie_in_the_plan_too(tmp_path: Path) -> None:
    for name, equal in (("tied", True), ("untied", False)):
        weights = random_weights(tiny_config())
        embedding = weights["model.embed_tokens.weight"]
        weights["lm_head.weight"] = embedding.copy() if equal else embedding + 1
        config = tiny_config(tie_word_embeddings=equal)
        keys = {"hf_architecture": "LlamaForCausalLM", "architecture": "llama", **config.to_metadata()}
        keys.pop("tie_word_embeddings", None)
        path = write_apr(tmp_path / f"{name}.apr", weights, keys)
        made = make_plan(
            TrainConfig(init=path, synthetic=True, seq_length=16, run_dir=tmp_path / "r"),
            world_size=1,
            rate=Rate(),
        )
        assert made.refusal is None
        assert made.model.tie_word_embeddings is equal


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-035")
def test_under_training_is_said_loudly_with_the_arithmetic(tmp_path: Path) -> None:
    tree = {"mode": "from-scratch", "synthetic": True, "run_dir": str(tmp_path / "r"), "num_steps": 100}
    made = make_plan(validate(tree, where="test"), world_size=1, rate=Rate())
    loud = next(one for one in made.warnings if "UNDER-TRAINED" in one)
    assert "100 steps x 16 x 1,024 = 1,638,400 tokens" in loud
    assert "over 322,045,952 parameters = 0.01 a parameter, below 10" in loud
    assert any("warm-up of 1,000 steps does not end" in one for one in made.warnings)


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-035")
def test_a_run_from_scratch_warns_of_too_few_tokens_before_its_first_step(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*inputs.data_flags(), "--mode", "from-scratch", "--model", str(inputs.model)]
    assert run_here(*flags, "--run-dir", str(tmp_path / "run"), "--num-steps", "2") == 0
    said = capsys.readouterr().out
    assert "warning: UNDER-TRAINED: 2 steps x 4 x 32 = 256 tokens" in said.split("running on")[0]
    assert run_here(*inputs.data_flags(), *_init_flags(inputs, tmp_path)) == 0
    assert "UNDER-TRAINED" not in capsys.readouterr().out, "pretrained weights have seen their tokens"


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-035")
@pytest.mark.parametrize(("steps", "warned"), [(9, True), (10, False), (11, False)])
def test_ten_tokens_a_parameter_are_enough(steps: int, warned: bool) -> None:
    assert (under_trained(steps, 2, 50, parameters=100) is not None) == warned


def test_a_high_rate_a_tiny_validation_set_and_many_passes_are_warned_of(
    inputs: Inputs, tmp_path: Path
) -> None:
    tree = {**config_of(inputs, tmp_path), "lr": 1e-3, "num_steps": 100_000}
    tree["evaluation"] = {"max_sequences": 16}
    made = make_plan(validate(tree, where="test"), world_size=1, rate=Rate())
    text = " ".join(made.warnings)
    assert "high for pretrained weights" in text
    assert "too few to tell small gains from noise" in text
    assert "passes over the data" in text


@pytest.mark.parametrize("processes", [1, 8])
def test_a_plan_fits_80_columns_explains_its_terms_and_ends_with_what_fits(
    processes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--synthetic", "--mode", "from-scratch", "--run-dir", str(tmp_path / "r")]
    flags += ["--processes", str(processes), "--batch-size", "16", "--memory", "5"]
    assert main(["plan", *flags, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert main(["plan", *flags]) == 0
    text = capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines())
    chosen, parts = next(iter(planned["memory_bytes"].items()))
    for part, (name, what) in memory.PARTS.items():
        assert (f"{name:<20}{parts[part] / 2**30:>8.2f}  {what}\n" in text) == bool(parts[part])
    last = " ".join(text.rpartition("\n\n")[2].split())
    fits = [name for name, size in planned["memory_bytes"].items() if size["total"] <= 5 * 2**30]
    others = [name for name in planned["memory_bytes"] if name not in fits]
    assert planned["fits"] == {name: name in fits for name in planned["memory_bytes"]}
    assert last.startswith(f"Fits in 5 GiB: {', '.join(fits) or 'nothing'}")
    assert last.endswith(f"does not fit: {', '.join(others)}")
    assert chosen in others


def planned_stop(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[dict[str, Any], list[str], str]:
    """What a plan says of stopping, as JSON, its warnings, and the text of the plan."""
    assert main(["plan", *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["plan", *flags]) == 0
    return found["stop"], found["warnings"], " ".join(capsys.readouterr().out.split())


def test_a_plan_says_whether_the_time_before_a_kill_suffices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = ["--synthetic", "--mode", "from-scratch", "--run-dir", str(run), "--num-steps", "5"]
    flags += ["--batch-size", "8", "--seq-length", "128", "--overwrite"]
    stop, _, text = planned_stop(capsys, *flags, "--grace", "600")
    assert stop["needed_s"] is stop["suffices"] is None
    assert "stop unknown: a step's time is not (give --tokens-per-second" in text
    parameters = make_plan(
        validate({"synthetic": True, "mode": "from-scratch", "run_dir": run}, where="t"),
        world_size=1,
        rate=Rate(),
    ).model.parameter_count()
    speed = ["--tokens-per-second", "16", "--disk", "0.25"]
    stop, warnings, text = planned_stop(capsys, *flags, *speed, "--grace", "600")
    assert stop["step_s"] == 8 * 128 / 16
    assert stop["save_s"] == pytest.approx(12 * parameters / 0.25e9)
    assert stop["needed_s"] == pytest.approx(64 + 2 * stop["save_s"])
    assert stop["suffices"] is True
    assert "600 s suffice" in text
    assert not any("SIGKILL" in warning for warning in warnings)
    stop, warnings, text = planned_stop(capsys, *flags, *speed, "--grace", "30")
    assert stop["suffices"] is False
    assert "30 s do NOT suffice" in text
    assert any(f"--signal=B:TERM@{stop['advised_s']}" in warning for warning in warnings)
    assert stop["advised_s"] >= 1.5 * stop["needed_s"]
    run.mkdir()
    lines = [{"kind": "step", "step": step, "wall_ms": 1000.0 * step} for step in (1, 2, 3)]
    lines += [{"kind": "save", "step": 3, "wall_ms": 5000.0}, {"kind": "evaluation", "wall_ms": 1e6}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "st')
    stop, _, text = planned_stop(capsys, *flags, "--no-checkpoint.background")
    assert (stop["step_s"], stop["save_s"], stop["needed_s"]) == (3.0, 5.0, 8.0)
    assert f"reserve {stop['advised_s']} s" in text
    stop, _, _ = planned_stop(capsys, *flags, "--checkpoint.background", "--grace", "8", "--disk", "1000")
    assert stop["step_s"] == 3.0
    assert stop["save_s"] == pytest.approx(12 * parameters / 1e12), "the copy of a save is not all of it"
    assert main(["plan", *flags, "--grace", "0"]) == 2


def test_a_plan_that_is_refused_ends_with_that(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--init", str(inputs.pretrained), *inputs.data_flags(), "--run-dir", str(tmp_path / "r")]
    assert main(["plan", *flags, "--parallel.offload", "optimizer+parameters", "--memory", "1"]) == 2
    text = capsys.readouterr().out
    assert text.endswith("The run would be refused; see NO above.\n")


@pytest.mark.parametrize("width", ["80", "132"])
@pytest.mark.parametrize("arguments", [["-m", "apr_dist", "plan", "--help"], ["apr_dist/train.py", "--help"]])
def test_the_help_fits_its_terminal_and_cuts_no_word(arguments: list[str], width: str) -> None:
    environment = {**os.environ, "COLUMNS": width}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
        env=environment,
    )
    lines = done.stdout.splitlines()
    assert all(len(line) <= int(width) or len(line.split()) <= 2 for line in lines), [
        line for line in lines if len(line) > int(width)
    ]
    if "train.py" in arguments[0]:
        words = " ".join(done.stdout.split())
        for strategy in StrategyChoice:
            assert re.search(rf"\b{strategy}\b", words)
        for key, _ in leaves(TrainConfig):
            assert f" {flag_of(key)}" in words


def test_the_plot_rises_and_falls_like_the_schedule() -> None:
    lines = list(lr_plot(plan.Schedule(peak_lr=1.0, warmup_steps=50, total_steps=100, lr_min=0.0)))
    rows = [line.split("|")[1] for line in lines if "|" in line]
    assert rows[0].index("*") in range(25, 35)
    assert rows[-1].startswith("*")
    assert rows[-1].endswith("*")


def test_a_rate_is_of_tokens_or_of_a_peak() -> None:
    assert Rate().tokens_per_second(10, 2) is None
    assert Rate(mfu=0.5, peak_flops=1e12).tokens_per_second(10**9, 4) == pytest.approx(2000)
    with pytest.raises(UsageError, match="both, or neither"):
        plan_verb(["--mfu", "0.4"])


def test_the_plan_does_not_import_pytorch(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom apr_dist.cli.plan import plan\n"
        f"plan(['--synthetic', '--json', '--mode', 'from-scratch', '--run-dir', {str(tmp_path / 'r')!r}])\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["parameters"] == PRESETS["llama-370m"].parameter_count()


def _init_flags(inputs: Inputs, tmp_path: Path) -> list[str]:
    return ["--init", str(inputs.pretrained), "--run-dir", str(tmp_path / "tuned"), "--num-steps", "0"]


def config_of(inputs: Inputs, tmp_path: Path) -> dict[str, object]:
    """A run of the shared inputs as a tree of plain values."""
    return {
        "init": str(inputs.pretrained),
        "dataset": str(inputs.train),
        "val_dataset": str(inputs.validation),
        "tokenizer": str(inputs.tokenizer),
        "run_dir": str(tmp_path / "run"),
        "seq_length": 32,
        "batch_size": 4,
    }
