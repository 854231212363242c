"""A finished run is judged by what it left, and by nothing that can be worked out again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from builders.runs import REPOSITORY, run_here

from apr_dist.cli import main as apr_dist
from apr_dist.config.schema import digests_of_saved
from apr_dist.contracts.evidence import evidence_problem, package_digest, read_verdict
from apr_dist.errors import ExitCode, OutputError, UsageError
from apr_dist.report.finetune_verdict import judge, keep_evidence
from apr_dist.report.finished_run import contradictions, read_finished_run

if TYPE_CHECKING:
    from builders.runs import Inputs

FINETUNE = "FALSIFY-APR-PRETRAIN-INIT-FINETUNE-"
Tamper = Callable[[Path], None]


@pytest.fixture(scope="module")
def finished(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good fine-tuning run of six steps; copied before anything in it is changed."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    flags = ("--num-steps", "6", "--eval-every", "3", "--lr", "1e-3", "--warmup-steps", "1")
    init = ("--init", str(inputs.pretrained), "--run-dir", str(run_dir))
    assert run_here(*inputs.data_flags(), *init, *flags) == 0
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run's folder."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def passed(run_dir: Path, falsifier: str, *, steps: int = 6) -> bool:
    """Whether every gate of that id passed."""
    own = [gate for gate in judge(run_dir, steps=steps).verdict.gates if gate.id == falsifier]
    assert own, f"no gate of {falsifier}"
    return all(gate.passed for gate in own)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change what a JSON file holds."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_lines(run_dir: Path, kind: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the last metrics line of one kind; a change that answers "drop" removes it."""
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    last = max(number for number, line in enumerate(lines) if line["kind"] == kind)
    if change(lines[last]) == "drop":
        del lines[last]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.falsifies(
    "FALSIFY-APR-PRETRAIN-INIT-FINETUNE-001",
    "FALSIFY-APR-PRETRAIN-INIT-FINETUNE-003",
    "FALSIFY-APR-PRETRAIN-INIT-FINETUNE-004",
    "FALSIFY-APR-PRETRAIN-INIT-FINETUNE-005",
    "FALSIFY-APR-PRETRAIN-INIT-FINETUNE-006",
    "FALSIFY-APR-PRETRAIN-INIT-FINETUNE-007",
    "FALSIFY-APR-DIST-TRAINER-036",
)
def test_a_good_run_passes_every_gate_and_its_verdict_is_signed(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert apr_dist(["verdict", str(run_dir), "--steps", "6"]) == 0
    assert "every ship-blocking gate passed" in capsys.readouterr().out
    signed = read_verdict(run_dir / "finetune-verdict.json")
    assert isinstance(signed, dict)
    digests = signed["signed"]
    assert digests["code_digest"] == package_digest()
    wanted = {"init_digest", "data_fingerprint", "val_data_fingerprint", "config_digest", "weights_digest"}
    assert all(digests[key] for key in wanted | {"checkpoint_digest", "metrics_sha256", "log_sha256"})
    shown = {gate["id"].removeprefix(FINETUNE) for gate in signed["gates"] if gate["passed"]}
    assert {"001", "003", "004", "005", "006", "007"} <= shown


def test_a_run_of_an_earlier_version_is_judged_by_the_keys_it_had(run_dir: Path) -> None:
    tree = yaml.safe_load((run_dir / "config.yaml").read_text())
    tree["steps_per_epoch"] = tree.pop("eval_every")
    tree["early_stop"]["min_epochs"] = tree["early_stop"].pop("min_evaluations")
    del tree["compute"]["z_loss"], tree["tracking"]  # that version had no such keys
    for key in ("sets", "counts", "prompts", "answer_tokens"):
        del tree["evaluation"][key]
    elsewhere = (
        "run_dir overwrite resume resume_allow checkpoint log_every init dataset val_dataset tokenizer"
    )
    counted = {
        key: value for key, value in tree.items() if key not in (*elsewhere.split(), "progress", "track")
    }
    counted["loader"] = {key: value for key, value in counted["loader"].items() if key != "mixture"}
    text = json.dumps(counted, sort_keys=True)
    found = json.loads((run_dir / "verdict.json").read_text())
    found["facts"]["config_digest"] = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    (run_dir / "verdict.json").write_text(json.dumps(found))
    (run_dir / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    other = "config.yaml is not the configuration of verdict.json"
    assert other not in contradictions(read_finished_run(run_dir))
    (run_dir / "config.yaml").write_text(yaml.safe_dump({**tree, "steps_per_epoch": 4}, sort_keys=False))
    assert other in contradictions(read_finished_run(run_dir))


def test_the_kept_evidence_has_the_configuration_it_was_signed_with() -> None:
    for config in (REPOSITORY / "contracts" / "evidence").glob("*/config.yaml"):
        signed = json.loads(config.with_name("verdict.json").read_text())["signed"]
        assert signed["config_digest"] in digests_of_saved(yaml.safe_load(config.read_text()))


@pytest.mark.parametrize("init", [True, False])
def test_without_steps_a_run_is_judged_by_its_own_gates(
    init: bool, run_dir: Path, inputs: Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    judged = run_dir if init else shutil.copytree(inputs.pretrained_run, run_dir / "scratch")
    assert apr_dist(["verdict", str(judged)]) == 0
    assert "judged by its own gates" in capsys.readouterr().out
    kept = json.loads((judged / "finetune-verdict.json").read_text())
    assert kept["rehearsal"] is True
    assert apr_dist(["verdict", str(judged), "--steps", "500"]) == (
        ExitCode.VERDICT if init else ExitCode.USAGE
    )


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-FINETUNE-005")
def test_a_run_of_fewer_steps_than_the_contract_s_does_not_pass_it(run_dir: Path) -> None:
    assert apr_dist(["verdict", str(run_dir), "--steps", "500"]) == ExitCode.VERDICT
    assert not passed(run_dir, FINETUNE + "005", steps=500)
    assert judge(run_dir, steps=6).body["rehearsal"]
    assert not judge(run_dir).body["rehearsal"]


TAMPERS: dict[str, Tamper] = {
    "a gate of the verdict turned over": lambda run: edit(
        run / "verdict.json", lambda v: next(g for g in v["gates"] if "INV" in g["id"]).update(passed=True)
    ),
    "an exit code of the verdict": lambda run: edit(run / "verdict.json", lambda v: v.update(exit_code=10)),
    "a better loss in the verdict": lambda run: edit(
        run / "verdict.json", lambda v: v["facts"]["val_losses"].__setitem__(-1, 1.0)
    ),
    "a better loss in the metrics": lambda run: edit_lines(
        run, "evaluation", lambda line: line.update(val_loss=1.9)
    ),
    "a step left out of the metrics": lambda run: edit_lines(run, "step", lambda line: "drop"),
    "a training loss of the metrics": lambda run: edit_lines(
        run, "step", lambda line: line.update(train_loss=2.0)
    ),
    "another configuration": lambda run: (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("lr: 0.001", "lr: 0.0001")
    ),
    "the log of a run that failed": lambda run: (run / "train.log").write_text("... (exit code 7)\n"),
    "a data fingerprint": lambda run: edit(
        run / "verdict.json", lambda v: v["facts"].update(data_fingerprint="0" * 64)
    ),
    "a code version": lambda run: edit(
        run / "verdict.json", lambda v: v["facts"].update(code_digest="sha256:0")
    ),
    "more tokens than the steps hold": lambda run: edit(
        run / "verdict.json", lambda v: v["facts"].update(tokens_seen=10**9)
    ),
}


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-036")
@pytest.mark.parametrize("what", TAMPERS)
def test_a_run_that_was_edited_contradicts_itself(what: str, run_dir: Path) -> None:
    TAMPERS[what](run_dir)
    assert not passed(run_dir, "FALSIFY-APR-DIST-TRAINER-036")
    assert apr_dist(["verdict", str(run_dir), "--steps", "6"]) == ExitCode.VERDICT


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-036")
def test_the_checkpoint_of_another_run_is_not_this_one_s(run_dir: Path, inputs: Inputs) -> None:
    shutil.copy(inputs.pretrained, run_dir / "other.apr")
    (run_dir / "other.apr").replace(run_dir / "checkpoint.apr")
    verdict = judge(run_dir, steps=6).verdict
    said = next(gate.measured for gate in verdict.gates if gate.id == "FALSIFY-APR-DIST-TRAINER-036")
    assert "does not hold the weights" in said
    assert verdict.exit_code is ExitCode.VERDICT


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-FINETUNE-004")
def test_a_checkpoint_that_is_damaged_or_gone_fails_the_verdict(run_dir: Path) -> None:
    content = (run_dir / "checkpoint.apr").read_bytes()
    (run_dir / "checkpoint.apr").unlink()
    assert not passed(run_dir, FINETUNE + "004")
    (run_dir / "checkpoint.apr").write_bytes(content[:-7])
    assert not passed(run_dir, FINETUNE + "004")
    assert apr_dist(["verdict", str(run_dir), "--steps", "6"]) == ExitCode.VERDICT


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-FINETUNE-003")
@pytest.mark.parametrize(
    ("change", "good"),
    [
        ({}, True),
        ({"init_loss": 6.3}, False),
        ({"init_loss": 3.9, "random_loss": 3.8}, False),
    ],
)
def test_an_init_is_below_random_weights_on_the_same_tokens(
    change: dict[str, float], good: bool, run_dir: Path
) -> None:
    edit_lines(run_dir, "random-weights", lambda line: line.update(change))
    assert passed(run_dir, FINETUNE + "003") == good


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-FINETUNE-003", "FALSIFY-APR-PRETRAIN-INIT-FINETUNE-007")
def test_what_was_not_measured_is_not_passed(run_dir: Path) -> None:
    edit_lines(run_dir, "random-weights", lambda line: "drop")
    assert not passed(run_dir, FINETUNE + "003")
    for _ in range(2):
        edit_lines(run_dir, "agreement", lambda line: "drop")
    assert not passed(run_dir, FINETUNE + "007")


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-FINETUNE-007")
def test_one_impossible_loss_in_the_middle_is_seen(run_dir: Path) -> None:
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    middle = next(line for line in lines if line["kind"] == "evaluation" and line["step"] == 3)
    middle["val_loss"] = 0.685
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert not passed(run_dir, FINETUNE + "007")


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-FINETUNE-006")
@pytest.mark.parametrize(
    "line",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "RuntimeError: DefaultCPUAllocator: can't allocate memory",
        "OSError: [Errno 24] Too many open files",
        "error: MemoryError: ",
    ],
)
def test_a_resource_error_in_the_log_is_named_and_stops_nothing(line: str, run_dir: Path) -> None:
    log = run_dir / "train.log"
    log.write_text(f"{line}\n{log.read_text()}")
    gate = next(g for g in judge(run_dir, steps=6).verdict.gates if g.id == FINETUNE + "006")
    assert not gate.passed
    assert line in gate.measured
    assert apr_dist(["verdict", str(run_dir), "--steps", "6"]) == 0


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-FINETUNE-006")
def test_a_log_that_is_gone_shows_nothing(run_dir: Path) -> None:
    (run_dir / "train.log").unlink()
    assert not passed(run_dir, FINETUNE + "006")


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-FINETUNE-002")
@pytest.mark.parametrize(
    ("wall", "batch", "met"), [(3600.0, 8, True), (3601.0, 8, False), (100.0, 7, False), (None, 8, False)]
)
def test_the_wall_time_counts_only_at_the_size_it_was_stated_for(
    wall: float | None, batch: int, met: bool, run_dir: Path
) -> None:
    edit(run_dir / "verdict.json", lambda v: v["facts"].update(wall_seconds=wall))
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines() if '"step", "step": 6' in line]
    path.write_text(
        path.read_text() + "".join(json.dumps({**lines[0], "step": n}) + "\n" for n in range(7, 501))
    )
    config = (run_dir / "config.yaml").read_text()
    config = config.replace("batch_size: 4\n", f"batch_size: {batch}\n", 1)
    (run_dir / "config.yaml").write_text(config.replace("seq_length: 32", "seq_length: 512"))
    gate = next(g for g in judge(run_dir).verdict.gates if g.id == FINETUNE + "002")
    assert gate.passed == met
    assert not gate.ship_blocking


def test_evidence_holds_what_may_be_kept_and_nothing_else(
    run_dir: Path, inputs: Inputs, tmp_path: Path
) -> None:
    (run_dir / "report-loss.png").write_bytes(b"\x89PNG")
    kept = tmp_path / "evidence"
    judged = judge(run_dir, steps=6)
    keep_evidence(judged, kept, force=False)
    assert {path.name for path in kept.iterdir()} == {
        *("metrics.jsonl", "config.yaml", "verdict.json", "report-loss.png")
    }
    for path in kept.iterdir():
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content
        assert str(inputs.pretrained.parents[2]).encode() not in content
    assert evidence_problem(FINETUNE + "001", kept / "verdict.json") == "is of a rehearsal"
    contract = ["verdict", str(run_dir), "--steps", "500", "--evidence", str(tmp_path / "none")]
    assert apr_dist(contract) == ExitCode.VERDICT
    assert not (tmp_path / "none").exists(), "a run that failed is no evidence"
    with pytest.raises(OutputError, match="already holds files"):
        keep_evidence(judged, kept, force=False)
    keep_evidence(judged, kept, force=True)


def test_what_is_no_finished_run_is_refused_in_a_sentence(
    run_dir: Path, inputs: Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="did not start from a file"):
        judge(inputs.pretrained_run)
    (run_dir / "metrics.jsonl").write_text("{\n")
    assert apr_dist(["verdict", str(run_dir)]) == ExitCode.USAGE
    assert "it is not JSON" in capsys.readouterr().err
    (run_dir / "verdict.json").unlink()
    assert apr_dist(["verdict", str(run_dir)]) == ExitCode.USAGE


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-FINETUNE-001")
def test_a_run_that_was_stopped_has_not_ended_well(inputs: Inputs, tmp_path: Path) -> None:
    flags = ("--num-steps", "6", "--eval-every", "3", "--warmup-steps", "0", "--lr", "1e6")
    init = ("--init", str(inputs.pretrained), "--run-dir", str(tmp_path / "run"))
    assert run_here(*inputs.data_flags(), *init, *flags) != 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.splitlines()[-1].startswith("error: ")
    assert not passed(tmp_path / "run", FINETUNE + "001")
