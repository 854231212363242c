"""A run folder belongs to one run, in one order: locks, identities, branches, and what is never deleted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from builders.runs import REPOSITORY, TRAIN, metrics, newest_whole, run_here, verdict, whole_folders
from builders.tokens import build_tiny_dataset

from apr_dist.apr.reader import AprReader
from apr_dist.data.loader import TokenLoader
from apr_dist.errors import ExitCode
from apr_dist.runs import saved_state
from apr_dist.runs.folder import RunFolder
from apr_dist.runs.history import History
from apr_dist.runs.lock import RunLock
from apr_dist.runs.saved_state import SavedState, retire, write_state

if TYPE_CHECKING:
    from builders.runs import Inputs


def flags(inputs: Inputs, run_dir: Path, *more: str) -> list[str]:
    given = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(run_dir)]
    given += ["--num-steps", "8", "--eval-every", "2", "--lr", "1e-3", "--warmup-steps", "2"]
    given += ["--evaluation.random-sequences", "0", "--target-val-loss", "0.1", "--early-stop.patience", "99"]
    return [*given, *more]


@pytest.fixture(scope="module")
def finished(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps, saved at 2, 4, 6 and 8."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    assert run_here(*flags(inputs, run_dir, "--checkpoint.keep-last", "9")) == 0
    return run_dir


def names(run_dir: Path) -> list[str]:
    return [folder.name for folder in whole_folders(run_dir)]


def steps_of(run_dir: Path) -> list[int]:
    return [line["step"] for line in metrics(run_dir)]


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-012")
def test_a_branch_sets_aside_the_steps_it_leaves_and_is_resumed_itself(
    finished: Path, inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    keep_one = ("--checkpoint.keep-last", "1", "--checkpoint.keep-best", "0")
    other = ("--lr", "3e-3", "--resume-allow", "lr", *keep_one)
    branch = ("--resume", str(run_dir / "steps" / "000002"), "--num-steps", "4", *other)
    assert run_here(*flags(inputs, run_dir, *branch, "--resume-allow", "lr,num_steps")) == 0
    said = capfd.readouterr().out
    assert "set aside in" in said
    assert "step 4, 6, 8" in said
    # Stopped here, the branch holds its own step 4 alone; the abandoned ones are whole, elsewhere.
    assert names(run_dir) == ["000004"]
    aside = run_dir / "set-aside" / "1"
    assert sorted(path.name for path in aside.glob("0*")) == ["000004", "000006", "000008"]
    assert steps_of(aside) == list(range(1, 9))
    again = flags(inputs, run_dir, "--resume", "auto", *other, "--resume-allow", "lr,num_steps")
    assert run_here(*again) == 0
    assert "resumes after step 4" in capfd.readouterr().out
    assert steps_of(run_dir) == list(range(1, 9))
    assert names(run_dir) == ["000008"]
    rates = {line["step"]: line["lr"] for line in metrics(run_dir)}
    before = {line["step"]: line["lr"] for line in metrics(finished)}
    assert rates[2] == before[2]
    assert rates[3] > 2 * before[3]


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-012")
def test_a_damaged_newest_step_never_costs_the_good_ones(
    finished: Path, inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    flip(run_dir / "steps" / "000008" / "checkpoint.apr")
    keep_one = ("--checkpoint.keep-last", "1", "--checkpoint.keep-best", "0", "--resume", "auto")
    assert run_here(*flags(inputs, run_dir, *keep_one)) == 0
    said = capfd.readouterr().out
    assert "skipped: [FALSIFY-APR-DIST-CHECKPOINT-006]" in said
    assert "resumes after step 6" in said
    assert names(run_dir) == ["000008"]
    assert (run_dir / "set-aside" / "1" / "000008").is_dir()
    assert verdict(run_dir)["facts"]["weights_digest"] == verdict(finished)["facts"]["weights_digest"]


def test_when_no_step_can_be_resumed_nothing_is_deleted(
    finished: Path, inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    for folder in whole_folders(run_dir):
        flip(folder / "checkpoint.apr")
    (run_dir / "checkpoint.apr").unlink()
    assert run_here(*flags(inputs, run_dir, "--resume", "auto")) == ExitCode.MODEL_FILE
    assert "none of the 4 step folders can be resumed" in capfd.readouterr().err
    assert names(run_dir) == ["000002", "000004", "000006", "000008"]


def test_another_run_s_folder_is_not_resumed_into(
    finished: Path, inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    assert run_here(*flags(inputs, other, "--num-steps", "2", "--seed", "5")) == 0
    resume = ("--resume", str(finished / "steps" / "000004"))
    before = (other / "metrics.jsonl").read_bytes()
    assert run_here(*flags(inputs, other, *resume)) == ExitCode.OUTPUT
    assert "[FALSIFY-APR-DIST-CHECKPOINT-003]" in capfd.readouterr().err
    assert (other / "metrics.jsonl").read_bytes() == before
    assert run_here(*flags(inputs, other, *resume, "--overwrite")) == 0
    assert steps_of(other) == list(range(1, 9))  # one history: the steps before the branch came along
    assert verdict(other)["facts"]["weights_digest"] == verdict(finished)["facts"]["weights_digest"]
    assert names(finished) == ["000002", "000004", "000006", "000008"]


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-012")
def test_an_overwritten_run_leaves_no_step_to_resume(
    finished: Path, inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    short = ("--num-steps", "4", "--resume-allow", "num_steps")
    assert run_here(*flags(inputs, run_dir, "--overwrite", *short)) == 0
    assert names(run_dir)[-1] == "000004", "nothing of the eight steps before; the best may be an earlier one"
    assert run_here(*flags(inputs, run_dir, "--resume", "auto", "--resume-allow", "num_steps")) == 0
    assert "resumes after step 4" in capfd.readouterr().out


@pytest.mark.parametrize("init", ["checkpoint.apr", "steps/000008/checkpoint.apr"])
def test_overwriting_never_deletes_the_init(
    init: str, finished: Path, inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    given = ("--init", str(run_dir / init), "--tokenizer", str(inputs.tokenizer), "--overwrite")
    assert run_here(*flags(inputs, run_dir, *given)) == ExitCode.OUTPUT
    assert "deletes the init file" in capfd.readouterr().err
    assert names(run_dir) == ["000002", "000004", "000006", "000008"]


def saved(run: RunFolder, step: int, *, val_loss: float = 1.0, identity: str = "a") -> None:
    """A step folder with a marker, as far as the order of folders looks at it."""
    folder = run.step(step)
    folder.path.mkdir(parents=True)
    folder.checkpoint.write_bytes(b"model")
    folder.index.write_text(json.dumps({"format": "apr-dist-adamw-v2", "updates": 1, "files": {"x": ""}}))
    (folder.path / "x").write_bytes(b"")
    digests = [saved_state.file_digest(path) for path in (folder.checkpoint, folder.index, folder.path / "x")]
    folder.index.write_text(
        json.dumps({"format": "apr-dist-adamw-v2", "updates": 1, "files": {"x": digests[2]}})
    )
    state = SavedState(
        step=step,
        tokens_seen=1,
        train_loss=1.0,
        grad_norm_max=1.0,
        evaluations=[[val_loss, 1]],
        agreements=[],
        config={},
        config_digest="",
        data_fingerprint=None,
        init_digest=None,
        checkpoint_digest=digests[0],
        optimizer_digest=saved_state.file_digest(folder.index),
        evaluated_at=step,
        run=identity,
    )
    write_state(folder, state)


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-012")
def test_steps_are_ordered_by_number(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (999_998, 1_000_000, 1_000_002, 20):
        saved(run, step)
    assert [one.step for one in run.whole()] == [20, 999_998, 1_000_000, 1_000_002]
    assert newest_whole(tmp_path) == run.step(1_000_002).path
    retire(run, keep_last=1, keep_every=None, keep_best=0, evaluation=None)
    assert [one.step for one in run.step_folders()] == [1_000_002]


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-012")
def test_a_step_of_another_run_is_named_and_skipped(tmp_path: Path) -> None:
    run, skipped = RunFolder(tmp_path), []
    for step, identity in ((4, "parent"), (8, "mine"), (10, "parent"), (12, "stranger")):
        saved(run, step, identity=identity)
    History("mine", (("parent", 6),)).write(run)
    found = saved_state.newest_whole(run, skipped.append)
    assert found == run.step(8)
    assert ["000012" in one or "000010" in one for one in skipped] == [True, True]
    run.step(8).remove()
    assert saved_state.newest_whole(run) == run.step(4)


def test_the_best_steps_are_kept_beside_the_newest(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step, loss in ((2, 2.3), (4, 2.05), (6, 2.2), (8, 2.05), (10, 2.4), (12, float("inf"))):
        saved(run, step, val_loss=loss)
    retire(run, keep_last=1, keep_every=None, keep_best=2, evaluation=None)
    assert [one.step for one in run.whole()] == [4, 8, 12]
    assert saved_state.best(run, None)[0] == (run.step(8), 2.05)
    assert saved_state.best(run, "another measurement") == []


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-011")
def test_a_second_process_in_the_folder_is_refused_and_changes_nothing(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    long = ("--num-steps", "100000", "--eval-every", "100000", "--resume", "auto")
    command = [sys.executable, str(TRAIN), *flags(inputs, run_dir, *long)]
    first = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert first.stdout is not None
        for line in first.stdout:
            if line.startswith("step") and "/100000" in line:
                break
        before = steps_of(run_dir)
        assert run_here(*flags(inputs, run_dir, *long)) == ExitCode.OUTPUT
        error = capfd.readouterr().err
        assert "[FALSIFY-APR-DIST-CHECKPOINT-011]" in error
        assert f"process {first.pid} on " in error
        assert steps_of(run_dir)[: len(before)] == before
    finally:
        first.kill()
        first.communicate()
    with RunLock(RunFolder(run_dir), warn=pytest.fail) as lock:  # a killed process leaves no lock behind
        lock.take()
    assert not (run_dir / "run.lock").exists()


def test_a_lock_file_alone_does_not_make_a_folder_occupied(inputs: Inputs, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "run.lock").write_text("left by a killed process")
    assert run_here(*flags(inputs, run_dir, "--num-steps", "0")) == 0


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-007")
def test_other_held_out_data_are_refused_or_begin_a_comparison_of_their_own(
    finished: Path, inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "steps" / "000006")
    shutil.rmtree(run_dir / "steps" / "000008")
    held_out = build_tiny_dataset(tmp_path / "data", inputs.tokenizer, files=60) / "validation"
    given = flags(inputs, run_dir, "--resume", "auto", "--val-dataset", str(held_out))
    assert run_here(*given) == ExitCode.USAGE
    error = capfd.readouterr().err
    assert "held-out shards" in error
    assert "--resume-allow val_dataset" in error
    assert run_here(*given, "--resume-allow", "val_dataset") == 0
    lines = metrics(run_dir, "evaluation")
    restarted = [line for line in lines if line["step"] >= 4][1:]
    assert [line["evaluation"] for line in restarted] == [0, 1, 2]
    assert verdict(run_dir)["facts"]["val_losses"] == [line["val_loss"] for line in restarted]


def test_equal_runs_write_equal_steps(inputs: Inputs, tmp_path: Path) -> None:
    runs = [tmp_path / "one", tmp_path / "elsewhere" / "two"]
    for number, run_dir in enumerate(runs):
        torch.manual_seed(number)  # what the process drew before is no part of a run
        assert run_here(*flags(inputs, run_dir, "--num-steps", "2")) == 0
    one, two = (
        {path.name: path.read_bytes() for path in (run_dir / "steps" / "000002").iterdir()}
        for run_dir in runs
    )
    assert len(one) == 4
    assert one == two


def test_a_larger_batch_goes_on_with_the_next_unseen_sequence(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    batch = TokenLoader.batch

    def noted(self: TokenLoader, k: int) -> object:
        begin = self._position(k)
        seen.append((begin, begin + self._batch_size))
        return batch(self, k)

    monkeypatch.setattr(TokenLoader, "batch", noted)
    run_dir = tmp_path / "run"
    assert run_here(*flags(inputs, run_dir, "--num-steps", "4")) == 0
    more = ("--resume", "auto", "--num-steps", "6", "--batch-size", "8")
    allowed = ("--resume-allow", "batch_size,num_steps")
    assert run_here(*flags(inputs, run_dir, *more, *allowed)) == 0
    assert seen == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 24), (24, 32)]
    assert verdict(run_dir)["facts"]["data"]["train"]["sequences"] == 32
    # And once more, from a state that remembers where the batch size changed.
    again = ("--resume", "auto", "--num-steps", "8", "--batch-size", "2")
    assert run_here(*flags(inputs, run_dir, *again, *allowed)) == 0
    assert seen[-2:] == [(32, 34), (34, 36)]


def test_a_mixture_refuses_another_batch_size(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    given = flags(inputs, run_dir, "--num-steps", "2", "--loader.mixture", f"{inputs.train}=1.0")
    at = given.index("--dataset")
    given = given[:at] + given[at + 2 :]
    assert run_here(*given) == 0
    more = ("--resume", "auto", "--num-steps", "4", "--batch-size", "8")
    assert run_here(*given, *more, "--resume-allow", "batch_size,num_steps") == ExitCode.USAGE
    assert "a mixture deals its shares by batches" in capfd.readouterr().err


@pytest.mark.parametrize("final", ["last", "best"])
def test_the_best_step_is_kept_named_and_handed_over_on_request(
    final: str, inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    rising = ("--lr", "2e-2", "--warmup-steps", "8", "--num-steps", "8", "--checkpoint.final", final)
    code = run_here(*flags(inputs, run_dir, *rising))
    losses = {line["step"]: line["val_loss"] for line in metrics(run_dir, "evaluation") if line["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert best != 8, f"the losses {losses} do not rise, so this test would show nothing"
    said = verdict(run_dir)
    assert said["facts"]["best"]["step"] == best
    assert said["facts"]["best"]["val_loss"] == losses[best]
    assert f"the best step is {best}" in capfd.readouterr().out
    assert names(run_dir) == [f"{step:06d}" for step in sorted({best, 8})]
    handed_over = best if final == "best" else 8
    assert (run_dir / "checkpoint.apr").samefile(run_dir / "steps" / f"{handed_over:06d}" / "checkpoint.apr")
    facts = json.loads((run_dir / "checkpoint.metadata.json").read_text())
    assert (facts["step"], facts["val_loss"]) == (handed_over, losses[handed_over])
    with AprReader(run_dir / "checkpoint.apr") as reader:
        assert reader.metadata.custom["apr_dist.val_loss"] == losses[handed_over]
    assert code in (0, ExitCode.VERDICT)


@pytest.mark.parametrize(
    ("launched", "given", "code"),
    [
        ("bf16", (), ExitCode.USAGE),
        ("fp16", (), ExitCode.USAGE),
        ("fp8", ("--parallel.precision", "bf16"), ExitCode.USAGE),
        ("bf16", ("--parallel.precision", "bf16"), ExitCode.OK),
        ("no", ("--parallel.precision", "bf16"), ExitCode.OK),
    ],
)
def test_a_precision_of_the_launcher_is_never_ignored(
    launched: str,
    given: tuple[str, ...],
    code: int,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert run_here(*flags(inputs, tmp_path / "run", "--num-steps", "0", *given)) == code
    if code:
        assert f"the launcher asks for mixed precision {launched}" in capfd.readouterr().err


def flip(path: Path) -> None:
    """Change one bit in a copy of the file, not in what else has its name."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(bytes(content))


def test_a_killed_run_is_named_by_the_next_start(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    long = ("--num-steps", "100000", "--eval-every", "2", "--checkpoint.keep-best", "0")
    process = subprocess.Popen(
        [sys.executable, str(TRAIN), *flags(inputs, run_dir, *long)],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while newest_whole(run_dir) is None:
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert not (run_dir / "verdict.json").exists()
    step = int(whole_folders(run_dir)[-1].name)
    more = ("--resume", "auto", "--num-steps", str(step), "--resume-allow", "num_steps")
    assert run_here(*flags(inputs, run_dir, *more)) == 0
    assert "left no verdict" in capfd.readouterr().out
