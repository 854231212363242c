"""Stopping and going on: bit for bit the same run, from whole step folders only, and never another run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from builders.runs import (
    REPOSITORY,
    TRAIN,
    metrics,
    newest_whole,
    run_here,
    verdict,
    whole_folders,
)

from apr_dist.apr.reader import AprReader
from apr_dist.apr.writer import AprWriter
from apr_dist.errors import ExitCode, OutputError
from apr_dist.parallel import gather

if TYPE_CHECKING:
    from builders.runs import Inputs
    from builders.warm_ranks import WarmRanks


def flags(inputs: Inputs, run_dir: Path, *more: str) -> list[str]:
    given = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(run_dir)]
    given += ["--num-steps", "6", "--eval-every", "2", "--lr", "1e-3", "--warmup-steps", "2"]
    return [*given, "--checkpoint.keep-last", "9", "--target-val-loss", "0.1", *more]


@pytest.fixture(scope="module")
def straight(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps without a stop, every step folder kept."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    assert run_here(*flags(inputs, run_dir)) == 0
    return run_dir


def stopped_after(straight: Path, run_dir: Path, step: int) -> Path:
    """A copy of the run as it was when it had just saved ``step``."""
    shutil.copytree(straight, run_dir)
    for folder in whole_folders(run_dir):
        if int(folder.name) > step:
            shutil.rmtree(folder)
    (run_dir / "verdict.json").unlink()
    return run_dir


def state_bytes(run_dir: Path, step: int) -> tuple[dict[str, bytes], bytes]:
    folder = run_dir / "steps" / f"{step:06d}"
    with AprReader(folder / "checkpoint.apr") as reader:
        weights = {name: bytes(reader.raw(name)) for name in reader.tensors}
    return weights, b"".join(path.read_bytes() for path in sorted(folder.glob("optimizer*")))


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-008")
@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_is_the_straight_one_bit_for_bit(
    step: int, straight: Path, inputs: Inputs, tmp_path: Path
) -> None:
    run_dir = stopped_after(straight, tmp_path / "run", step)
    assert run_here(*flags(inputs, run_dir, "--resume", "auto")) == 0
    assert state_bytes(run_dir, 6) == state_bytes(straight, 6)
    compared = ("step", "train_loss", "grad_norm", "lr", "tokens_seen")
    for kind, keys in (("step", compared), ("evaluation", ("step", "val_loss"))):
        ours, theirs = metrics(run_dir, kind), metrics(straight, kind)
        assert [[line[key] for key in keys] for line in ours] == [
            [line[key] for key in keys] for line in theirs
        ]
    said, before = verdict(run_dir), verdict(straight)
    assert said["facts"]["weights_digest"] == before["facts"]["weights_digest"]
    assert [gate["gate"] for gate in said["gates"]] == [gate["gate"] for gate in before["gates"]]


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-008")
def test_a_run_saved_alone_goes_on_as_two_processes_with_the_same_losses(
    straight: Path, inputs: Inputs, ranks: WarmRanks, tmp_path: Path
) -> None:
    run_dir = stopped_after(straight, tmp_path / "run", 4)
    ended = ranks.launch(flags(inputs, run_dir, "--resume", "auto"), world_size=2)
    assert ended.codes == (0, 0), ended.errors
    assert verdict(run_dir)["facts"]["strategy"] == "ddp"
    for ours, theirs in zip(metrics(run_dir), metrics(straight), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)


@pytest.mark.falsifies("INV-TRAIN-003")
def test_the_recorded_digest_is_of_the_optimizer_state_on_disk(straight: Path) -> None:
    facts = json.loads((straight / "checkpoint.metadata.json").read_text())
    said = subprocess.run(
        ["sha256sum", "optimizer.json", "optimizer-00000-of-00001.safetensors"],
        cwd=straight / "steps" / "000006",
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    index, part = (line.split()[0] for line in said)
    assert facts["optimizer_state_sha"] == f"sha256:{index}"
    named = json.loads((straight / "steps" / "000006" / "optimizer.json").read_text())
    assert named["files"] == {"optimizer-00000-of-00001.safetensors": f"sha256:{part}"}
    assert named["updates"] == 6


def test_the_checkpoint_of_the_run_is_the_newest_step_s(straight: Path) -> None:
    assert (straight / "checkpoint.apr").samefile(straight / "steps" / "000006" / "checkpoint.apr")
    assert [folder.name for folder in whole_folders(straight)] == ["000002", "000004", "000006"]


def unmark(folder: Path) -> None:
    (folder / "state.json").unlink()


def truncate(folder: Path) -> None:
    os.truncate(folder / "checkpoint.apr", 1000)


def flip(folder: Path) -> None:
    path = folder / "optimizer-00000-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def lose(folder: Path) -> None:
    (folder / "optimizer-00000-of-00001.safetensors").unlink()


def garble(folder: Path) -> None:
    (folder / "state.json").write_text('{"step": 4')


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-006")
@pytest.mark.parametrize("harm", [unmark, truncate, flip, lose, garble])
def test_a_step_folder_that_is_not_whole_is_never_picked(
    harm: object, straight: Path, inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert callable(harm)
    run_dir = stopped_after(straight, tmp_path / "run", 4)
    broken = run_dir / "steps" / "000004"
    # Names of one file: harming this copy must not harm the run the other tests read.
    harm(broken)
    assert newest_whole(run_dir) == run_dir / "steps" / "000002"
    code = run_here(*flags(inputs, run_dir, "--resume", str(broken)))
    assert code == ExitCode.MODEL_FILE
    assert "[FALSIFY-APR-DIST-CHECKPOINT-006]" in capfd.readouterr().err
    assert run_here(*flags(inputs, run_dir, "--resume", "auto")) == 0
    assert state_bytes(run_dir, 6) == state_bytes(straight, 6)
    if harm is not unmark:  # a folder without its marker was never finished, which is no news
        assert "skipped: [FALSIFY-APR-DIST-CHECKPOINT-006]" in capfd.readouterr().out


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-007")
@pytest.mark.parametrize(
    ("changed", "key"),
    [
        (("--lr", "2e-3"), "lr"),
        (("--seed", "1"), "seed"),
        (("--num-steps", "8"), "num_steps"),
        (("--batch-size", "8"), "batch_size"),
        (("--optimizer.beta2", "0.95"), "optimizer.beta2"),
    ],
)
def test_a_resume_that_changes_the_mathematics_is_refused_unless_named(
    changed: tuple[str, ...],
    key: str,
    straight: Path,
    inputs: Inputs,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run_dir = stopped_after(straight, tmp_path / "run", 4)
    given = flags(inputs, run_dir, "--resume", "auto", *changed)
    assert run_here(*given) == ExitCode.USAGE
    error = capfd.readouterr().err
    assert "[FALSIFY-APR-DIST-CHECKPOINT-007]" in error
    assert f"{key} was " in error
    assert run_here(*given, "--resume-allow", key) == 0


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-007")
def test_a_resume_on_other_data_or_another_init_is_refused(
    straight: Path, inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = stopped_after(straight, tmp_path / "run", 4)
    other = ("--dataset", str(inputs.validation), "--val-dataset", str(inputs.train), "--loader.any-split")
    assert run_here(*flags(inputs, run_dir, "--resume", "auto", *other)) == ExitCode.USAGE
    assert "training shards" in capfd.readouterr().err
    init = ("--init", str(straight / "checkpoint.apr"))
    assert run_here(*flags(inputs, run_dir, "--resume", "auto", *init)) == ExitCode.USAGE
    assert "init file" in capfd.readouterr().err


def test_a_key_that_does_not_exist_cannot_be_allowed_to_change(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = flags(inputs, tmp_path / "run", "--resume", "auto", "--resume-allow", "num_steps,sed")
    assert run_here(*given) == ExitCode.USAGE
    error = capfd.readouterr().err
    assert "resume_allow is 'num_steps,sed'" in error
    assert "there is no sed, nearest is seed" in error


def test_retention_keeps_the_newest_and_the_named_ones(inputs: Inputs, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    keep = ("--checkpoint.keep-last", "1", "--checkpoint.keep-every", "4", "--checkpoint.keep-best", "0")
    assert run_here(*flags(inputs, run_dir, *keep)) == 0
    assert sorted(path.name for path in (run_dir / "steps").iterdir()) == ["000004", "000006"]


def test_a_save_that_training_waits_for_writes_the_same_bytes(
    straight: Path, inputs: Inputs, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert run_here(*flags(inputs, run_dir, "--no-checkpoint.background")) == 0
    for step in (2, 4, 6):
        weights, state = state_bytes(run_dir, step)
        assert (weights, state) == state_bytes(straight, step)


class FullDisk(AprWriter):
    """A disk that has no room for the model of step 4."""

    def append(self, name: str, piece: object) -> None:
        if "000004" in str(self.path):
            raise OutputError("it cannot be written (No space left on device)", where=self.path)
        super().append(name, piece)


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-009")
@pytest.mark.parametrize("background", ["--checkpoint.background", "--no-checkpoint.background"])
def test_a_save_that_fails_ends_the_run_and_leaves_the_one_before(
    background: str,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gather, "AprWriter", FullDisk)
    run_dir = tmp_path / "run"
    keep_one = ("--checkpoint.keep-last", "1", "--checkpoint.keep-best", "0", background)
    assert run_here(*flags(inputs, run_dir, *keep_one)) == ExitCode.OUTPUT
    assert "No space left on device" in capfd.readouterr().err
    assert newest_whole(run_dir) == run_dir / "steps" / "000002"
    monkeypatch.undo()
    assert run_here(*flags(inputs, run_dir, *keep_one, "--resume", "auto")) == 0
    assert [folder.name for folder in whole_folders(run_dir)] == ["000006"]


def test_auto_without_anything_to_resume_begins(inputs: Inputs, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("seed: 1\n")
    assert run_here(*flags(inputs, run_dir, "--resume", "auto")) == 0
    assert len(metrics(run_dir)) == 6


@pytest.mark.falsifies("FALSIFY-APR-DIST-DISTRIBUTED-004")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_just_finished_and_the_run_goes_on_from_there(
    number: signal.Signals, inputs: Inputs, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    long = (
        "--num-steps",
        "100000",
        "--eval-every",
        "100000",
        "--resume-allow",
        "num_steps,eval_every",
    )
    process = subprocess.Popen(
        [sys.executable, str(TRAIN), *flags(inputs, run_dir, *long)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step") and "/100000" in line and int(line.split()[1].split("/")[0]) >= 5:
            break
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == (ExitCode.TERMINATED if number == signal.SIGTERM else ExitCode.INTERRUPTED)
    assert "\nerror: " in f"\n{error}"
    assert "Traceback" not in error
    saved = newest_whole(run_dir)
    assert saved is not None
    step = int(saved.name)
    assert step >= 5
    assert metrics(run_dir)[-1]["step"] == step
    assert verdict(run_dir)["status"] == "ABORTED"
    more = ("--resume", "auto", "--num-steps", str(step + 1), "--eval-every", "100000")
    assert run_here(*flags(inputs, run_dir, *long, *more)) == 0
    assert metrics(run_dir)[-1]["step"] == step + 1


def test_saves_have_a_period_of_their_own_and_the_last_step_is_saved(inputs: Inputs, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert (
        run_here(*flags(inputs, run_dir, "--num-steps", "7", "--eval-every", "3", "--save-every", "2")) == 0
    )
    assert [folder.name for folder in whole_folders(run_dir)] == ["000002", "000004", "000006", "000007"]
    assert [line["step"] for line in metrics(run_dir, "evaluation")] == [0, 3, 6, 7]
    assert [line["evaluation"] for line in metrics(run_dir, "evaluation")] == [0, 1, 2, 3]
    rare = tmp_path / "rare"
    assert run_here(*flags(inputs, rare, "--eval-every", "2", "--save-every", "4")) == 0
    assert [folder.name for folder in whole_folders(rare)] == ["000004", "000006"]
    with AprReader(rare / "checkpoint.apr") as reader:
        assert reader.metadata.custom["apr_dist.val_loss"] == metrics(rare, "evaluation")[-1]["val_loss"]


def test_a_run_resumed_between_two_evaluations_is_the_straight_one(
    straight: Path, inputs: Inputs, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert run_here(*flags(inputs, run_dir, "--save-every", "3")) == 0
    stopped = stopped_after(run_dir, tmp_path / "stopped", 3)
    assert run_here(*flags(inputs, stopped, "--save-every", "3", "--resume", "auto")) == 0
    assert state_bytes(stopped, 6) == state_bytes(run_dir, 6)
    assert metrics(stopped, "evaluation")[-1]["val_loss"] == metrics(straight, "evaluation")[-1]["val_loss"]


def test_a_step_folder_of_an_earlier_version_is_read_under_the_new_names(
    straight: Path, inputs: Inputs, tmp_path: Path
) -> None:
    run_dir = stopped_after(straight, tmp_path / "run", 4)
    path = run_dir / "steps" / "000004" / "state.json"
    state = json.loads(path.read_text())
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["steps_per_epoch"] = config.pop("eval_every")
    config["early_stop"]["min_epochs"] = config["early_stop"].pop("min_evaluations")
    del config["save_every"]
    path.write_text(json.dumps({**state, "config": config, "epoch": 2}))
    assert run_here(*flags(inputs, run_dir, "--resume", "auto")) == 0
    assert state_bytes(run_dir, 6) == state_bytes(straight, 6)


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-009")
def test_a_kill_at_any_moment_of_saving_leaves_a_whole_step_to_go_on_from(
    inputs: Inputs, tmp_path: Path
) -> None:
    """A run that saves after every step is killed at moments that differ; the newest folder is whole.

    The second run's state is in host memory: it goes on from the first one's.
    """
    run_dir = tmp_path / "run"
    saving = ("--num-steps", "100000", "--eval-every", "1", "--evaluation.max-sequences", "1")
    saving += ("--early-stop.patience", "100000", "--resume", "auto", "--checkpoint.keep-last", "1")
    reached = 0
    for moment_s, offload in ((0.05, "none"), (0.11, "optimizer")):
        process = subprocess.Popen(
            [sys.executable, str(TRAIN), *flags(inputs, run_dir, *saving, "--parallel.offload", offload)],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        saves, said = 0, []
        for line in process.stdout:
            said.append(line)
            saves += "saved" in line
            if saves == 3:
                break
        else:
            pytest.fail("the run ended by itself: " + "".join(said[-5:]))
        time.sleep(moment_s)  # where in the next save the kill lands; any moment must do
        process.kill()
        process.communicate()
        whole = newest_whole(run_dir)
        assert whole is not None
        assert int(whole.name) >= reached + 3
        reached = int(whole.name)
