"""Whole runs through the entry point's ``main``, on real shards and a real (tiny) pretrained model."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders.runs import VOCABULARY, metrics, run_here, verdict

from apr_dist.apr.reader import AprReader
from apr_dist.errors import ExitCode

if TYPE_CHECKING:
    from builders.runs import Inputs

FAST = ("--lr", "1e-3", "--warmup-steps", "1", "--target-val-loss", "0.1")


def finetune(inputs: Inputs, run_dir: Path, *flags: str) -> int:
    return run_here(
        *inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(run_dir), *FAST, *flags
    )


def from_scratch(inputs: Inputs, run_dir: Path, *flags: str) -> int:
    return run_here(
        *inputs.data_flags(),
        *("--model", str(inputs.model), "--mode", "from-scratch", "--run-dir", str(run_dir), *flags),
    )


def weights(path: Path) -> dict[str, bytes]:
    with AprReader(path) as reader:
        return {name: bytes(reader.raw(name)) for name in reader.tensors}


@pytest.fixture(scope="module")
def tuned(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fine-tuning run of 12 steps, evaluated every 6, with 5 steps of warm-up."""
    run_dir = tmp_path_factory.mktemp("tuned") / "run"
    flags = ("--num-steps", "12", "--eval-every", "6", "--warmup-steps", "5", "--batch-size", "32")
    assert finetune(inputs, run_dir, *flags, "--evaluation.max-sequences", "128") == 0
    return run_dir


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-FINETUNE-001")
def test_a_finetune_ends_well_and_leaves_everything_it_promises(tuned: Path) -> None:
    left = {path.name for path in tuned.iterdir()}
    assert left == {
        "checkpoint.apr",
        "checkpoint.metadata.json",
        "config.yaml",
        "metrics.jsonl",
        "run.json",
        "steps",
        "train.log",
        "verdict.json",
    }
    said = verdict(tuned)
    assert said["status"] == "COMPLETED"
    assert said["exit_code"] == 0
    assert not said["synthetic"]
    assert all(gate["passed"] for gate in said["gates"] if gate["ship_blocking"])
    assert {"FALSIFY-APR-PRETRAIN-INIT-006", "FALSIFY-APR-DIST-TRAINER-001"} <= {
        gate["id"] for gate in said["gates"]
    }


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-021")
def test_every_step_is_logged_with_the_rate_and_norm_that_were_real(tuned: Path) -> None:
    lines = metrics(tuned)
    assert [line["step"] for line in lines] == list(range(1, 13))
    rates = [line["lr"] for line in lines]
    assert rates[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[5:]))
    assert len({line["grad_norm"] for line in lines}) == 12
    assert all(line["gpu_util_pct"] == 0 for line in lines)
    assert [line["tokens_seen"] for line in lines] == [1024 * k for k in range(1, 13)]


def test_the_validation_loss_falls_and_is_measured_before_and_after(tuned: Path) -> None:
    lines = metrics(tuned, "evaluation")
    assert [line["step"] for line in lines] == [0, 6, 12]
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]
    assert {line["tokens"] for line in lines} == {128 * 32}


@pytest.mark.falsifies("INV-TRAIN-002")
def test_every_save_leaves_checkpoint_and_facts(tuned: Path) -> None:
    facts = json.loads((tuned / "checkpoint.metadata.json").read_text())
    assert set(facts) >= {
        *("epoch", "train_loss", "val_loss", "train_ppl", "val_ppl", "optimizer_state_sha"),
        *("wall_seconds", "tokens_seen", "grad_norm_max"),
    }
    assert None not in facts.values()
    assert facts["epoch"] == 2
    assert facts["val_ppl"] == pytest.approx(math.exp(facts["val_loss"]))


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-FINETUNE-004", "FALSIFY-APR-DIST-TRAINER-023")
def test_a_checkpoint_carries_the_whole_identity_of_its_model(tuned: Path, inputs: Inputs) -> None:
    with AprReader(tuned / "checkpoint.apr") as saved, AprReader(inputs.pretrained) as init:
        assert {n: t.shape for n, t in saved.tensors.items()} == {n: t.shape for n, t in init.tensors.items()}
        assert sum(name.endswith("_proj.bias") for name in saved.tensors) == 6
        keys = saved.metadata.to_mapping()
        said = init.metadata.to_mapping()
        for key in ("architecture", "hf_architecture", "hf_model_type", "num_kv_heads", "rope_theta"):
            assert keys[key] == said[key]
        assert keys["tie_word_embeddings"] is True
        assert keys["apr_dist.init_digest"] == init.digest()
        assert keys["apr_dist.step"] == 12
        assert keys["param_count"] == sum(math.prod(t.shape) for t in saved.tensors.values())


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-005")
def test_a_checkpoint_opens_again_at_the_loss_it_was_saved_with(
    tuned: Path, inputs: Inputs, tmp_path: Path
) -> None:
    code = run_here(
        *inputs.data_flags(),
        *("--init", str(tuned / "checkpoint.apr"), "--num-steps", "0", "--run-dir", str(tmp_path / "again")),
        *("--evaluation.max-sequences", "128"),
    )
    assert code == 0
    ended, again = metrics(tuned, "evaluation")[-1], metrics(tmp_path / "again", "evaluation")[0]
    assert again["val_loss"] == pytest.approx(ended["val_loss"], abs=1e-6)
    gates = {gate["id"]: gate for gate in verdict(tmp_path / "again")["gates"]}
    assert gates["FALSIFY-APR-DIST-CHECKPOINT-005"]["passed"]


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-010")
def test_loading_and_saving_twice_gives_the_same_bytes_and_the_same_weights(
    inputs: Inputs, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        assert finetune(inputs, tmp_path / name, "--num-steps", "0") == 0
    first, second = ((tmp_path / name / "checkpoint.apr").read_bytes() for name in ("a", "b"))
    assert first == second
    assert weights(tmp_path / "a" / "checkpoint.apr") == weights(inputs.pretrained)


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-002")
def test_without_init_a_run_is_what_it_was_before_the_flag_existed(inputs: Inputs, tmp_path: Path) -> None:
    assert from_scratch(inputs, tmp_path / "run", "--num-steps", "1") == 0
    first = metrics(tmp_path / "run", "evaluation")[0]["val_loss"]
    assert first == pytest.approx(math.log(VOCABULARY), abs=0.2)
    with AprReader(tmp_path / "run" / "checkpoint.apr") as saved:
        assert not any("init" in key for key in saved.metadata.custom)


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-006")
def test_an_init_begins_far_below_random_weights_on_the_same_batch(
    inputs: Inputs, tuned: Path, tmp_path: Path
) -> None:
    assert from_scratch(inputs, tmp_path / "run", "--num-steps", "0") == 0
    random = metrics(tmp_path / "run", "evaluation")[0]["val_loss"]
    pretrained = metrics(tuned, "evaluation")[0]["val_loss"]
    assert pretrained < 0.7 * math.log(VOCABULARY) < math.log(VOCABULARY) - 1.5 < random


@pytest.mark.falsifies("INV-TRAIN-006")
def test_the_same_seed_gives_the_same_losses_and_another_seed_others(inputs: Inputs, tmp_path: Path) -> None:
    losses = {}
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert finetune(inputs, tmp_path / name, "--num-steps", "4", "--seed", seed) == 0
        losses[name] = [line["train_loss"] for line in metrics(tmp_path / name)]
    assert losses["a"] == losses["b"]
    assert losses["a"] != losses["c"]


@pytest.mark.parametrize("flags", [("--micro-batch-size", "1"), ("--micro-batch-size", "2")])
def test_accumulation_cuts_the_same_batch_and_changes_nothing(
    inputs: Inputs, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    assert finetune(inputs, tmp_path / "whole", "--num-steps", "3") == 0
    assert finetune(inputs, tmp_path / "cut", "--num-steps", "3", *flags) == 0
    for whole, cut in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "cut"), strict=True):
        assert cut["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-6)
        assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)


@pytest.mark.falsifies("INV-TRAIN-010")
def test_synthetic_data_is_named_on_every_line_and_in_everything_left(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--synthetic", "--model", str(inputs.model), "--seq-length", "16", "--batch-size", "2")
    assert run_here(*flags, "--num-steps", "2", "--run-dir", str(tmp_path / "run")) == 0
    out = capfd.readouterr().out.splitlines()
    assert out
    assert all(line.startswith("[SYNTHETIC]") for line in out)
    assert verdict(tmp_path / "run")["synthetic"] is True
    assert all(line["synthetic"] is True for line in metrics(tmp_path / "run"))
    with AprReader(tmp_path / "run" / "checkpoint.apr") as saved:
        assert saved.metadata.custom["apr_dist.synthetic"] is True


@pytest.mark.falsifies("INV-TRAIN-010")
def test_without_data_and_without_synthetic_nothing_is_trained(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = run_here(
        "--init", str(inputs.pretrained), "--run-dir", str(tmp_path / "run"), "--seq-length", "32"
    )
    assert code == ExitCode.USAGE
    assert "--dataset is not given" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.falsifies("INV-TRAIN-005")
def test_a_learning_rate_that_destroys_the_model_ends_in_a_documented_way(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    code = finetune(inputs, run_dir, "--lr", "3", "--num-steps", "12", "--eval-every", "3")
    assert code in (ExitCode.DIVERGENCE, ExitCode.NUMERICAL_INSTABILITY)
    said = verdict(run_dir)
    assert said["status"] == "ABORTED"
    assert said["exit_code"] == code
    assert "exit_code" not in said["facts"]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.falsifies("INV-TRAIN-004")
def test_patience_ends_a_run_early_and_says_so(inputs: Inputs, tmp_path: Path) -> None:
    flags = ("--lr", "1e-9", "--optimizer.weight-decay", "0", "--num-steps", "40", "--eval-every", "1")
    flags += ("--early-stop.patience", "1", "--evaluation.max-sequences", "4")
    assert finetune(inputs, tmp_path / "run", *flags) == 0
    said = verdict(tmp_path / "run")
    assert said["status"] == "EARLY_STOP"
    assert 3 <= said["facts"]["steps"] < 40


@pytest.mark.falsifies("INV-TRAIN-004")
def test_reaching_the_target_is_ok_and_missing_it_is_not_called_converged(
    inputs: Inputs, tuned: Path, tmp_path: Path
) -> None:
    flags = ("--num-steps", "5", "--eval-every", "1", "--target-val-loss", "9")
    assert finetune(inputs, tmp_path / "run", *flags) == 0
    reached = verdict(tmp_path / "run")
    assert reached["status"] == "OK"
    assert reached["facts"]["steps"] == 3
    missed = next(gate for gate in verdict(tuned)["gates"] if gate["gate"] == "target validation loss")
    assert not missed["passed"]
    assert verdict(tuned)["status"] == "COMPLETED"


@pytest.mark.falsifies("INV-TRAIN-011")
def test_data_that_runs_out_cycles_in_the_open_or_stops(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--dataset", str(inputs.validation), "--val-dataset", str(inputs.train), "--seq-length", "256")
    flags += ("--batch-size", "160", "--num-steps", "3", "--evaluation.max-sequences", "4")
    assert finetune(inputs, tmp_path / "swapped", *flags) == ExitCode.DATA
    assert "it is the validation part" in capfd.readouterr().err
    flags += ("--loader.any-split",)
    assert finetune(inputs, tmp_path / "cycles", *flags) == 0
    assert "pass 2 begins" in capfd.readouterr().out
    assert metrics(tmp_path / "cycles")[-1]["data_epoch"] == 1
    assert finetune(inputs, tmp_path / "stops", *flags, "--loader.max-epochs", "1") == ExitCode.DATA
    assert "epoch" in capfd.readouterr().err


def test_a_run_from_its_own_resolved_configuration_is_the_same_run(
    tuned: Path, inputs: Inputs, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    assert run_here("--config", str(tuned / "config.yaml"), "--run-dir", str(again)) == 0
    assert [line["train_loss"] for line in metrics(again)] == [line["train_loss"] for line in metrics(tuned)]


def test_block_order_trains_as_well(inputs: Inputs, tmp_path: Path) -> None:
    flags = ("--loader.shuffle", "block", "--loader.block-sequences", "4", "--num-steps", "3")
    assert finetune(inputs, tmp_path / "run", *flags) == 0
    assert len(metrics(tmp_path / "run")) == 3


def test_an_occupied_run_folder_keeps_its_files_unless_overwrite_is_given(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert finetune(inputs, run_dir, "--num-steps", "1") == 0
    before = (run_dir / "checkpoint.apr").read_bytes()
    assert finetune(inputs, run_dir, "--num-steps", "2") == ExitCode.OUTPUT
    assert "--overwrite" in capfd.readouterr().err
    assert (run_dir / "checkpoint.apr").read_bytes() == before
    assert finetune(inputs, run_dir, "--num-steps", "2", "--overwrite") == 0
    assert (run_dir / "checkpoint.apr").read_bytes() != before
