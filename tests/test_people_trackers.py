"""Trackers: the figures really arrive, and nothing a tracker does ends a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from builders.runs import Inputs, metrics, run_here

from apr_dist.choices import TRACKERS
from apr_dist.config.reading import parse_command_line
from apr_dist.config.sections import TrackingSection
from apr_dist.errors import ExitCode, UsageError
from apr_dist.gates.settings import check_trackers
from apr_dist.runs.trackers import Trackers


def flags(inputs: Inputs, run: Path, *more: str) -> list[str]:
    sizes = ("--num-steps", "4", "--eval-every", "2", "--init", str(inputs.pretrained))
    return [*inputs.data_flags(), "--run-dir", str(run), *sizes, *more]


def recorded(run: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard itself reads from the event files of a run."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reading.EventAccumulator(str(run / "tensorboard" / run.name)).Reload()
    return {tag: {one.step: one.value for one in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


def test_the_names_are_accelerates() -> None:
    assert set(TRACKERS) == {str(name) for name in LOGGER_TYPE_TO_CLASS}


def test_tensorboard_holds_what_metrics_jsonl_holds(inputs: Inputs, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    assert run_here(*flags(inputs, run, "--track", "tensorboard")) == 0
    found = recorded(run)
    steps = metrics(run)
    for key in ("train_loss", "lr", "grad_norm", "tokens_per_sec", "data_wait_ms"):
        assert found[key] == pytest.approx({line["step"]: line[key] for line in steps}, rel=1e-6), key
    evaluations = {line["step"]: line["val_loss"] for line in metrics(run, "evaluation")}
    assert found["val_loss"] == pytest.approx(evaluations, rel=1e-6)
    more = flags(inputs, run, "--track", "tensorboard", "--num-steps", "6", "--resume", "auto")
    assert run_here(*more, "--resume-allow", "num_steps") == 0
    assert sorted(recorded(run)["train_loss"]) == [1, 2, 3, 4, 5, 6]


class Failing:
    """A tracker that works until it is told of step 2."""

    requires_logging_directory = False
    told: list[int]

    def __init__(self, *_: object, **__: object) -> None:
        self.told = []

    def start(self) -> None:
        pass

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        assert all(isinstance(value, str | int | float | bool) for value in values.values())

    def log(self, values: dict[str, float], step: int) -> None:
        if step >= 2:
            raise ConnectionError("the server\n is gone")
        self.told.append(step)

    def finish(self) -> None:
        raise AssertionError("a tracker that failed is not told to finish")


def test_a_tracker_that_fails_in_mid_run_warns_once_and_training_goes_on(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Failing)
    monkeypatch.setattr("apr_dist.gates.settings.check_trackers", lambda _: None)
    assert run_here(*flags(inputs, tmp_path / "run", "--track", "wandb")) == 0
    out = capsys.readouterr().out
    assert out.count("warning: the tracker wandb failed and is told no more") == 1
    assert "(ConnectionError: the server is gone); metrics.jsonl has everything" in out
    assert len(metrics(tmp_path / "run")) == 4


def test_a_tracker_that_cannot_start_warns_and_the_others_go_on(tmp_path: Path) -> None:
    class Broken(Failing):
        def start(self) -> None:
            raise RuntimeError("no key")

    class Good(Failing):
        def log(self, values: dict[str, float], step: int) -> None:
            self.told.append(step)
            seen.update(values)

        def finish(self) -> None:
            seen["finished"] = 1.0

    seen: dict[str, float] = {}
    warned: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOGGER_TYPE_TO_CLASS, "aim", Broken)
        patch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Good)
        with Trackers(
            ("aim", "wandb"),
            run_dir=tmp_path,
            run="a",
            options=TrackingSection(),
            values={"lr": None},
            warn=warned.append,
        ) as trackers:
            trackers.measured({"kind": "step", "step": 7, "train_loss": 2.0, "passes": {"a": 1}, "val": None})
    assert len(warned) == 1
    assert "aim failed" in warned[0]
    assert seen == {"train_loss": 2.0, "passes/a": 1, "finished": 1.0}


def started(patch: pytest.MonkeyPatch, name: str) -> list[tuple[str, dict[str, Any]]]:
    """The project and arguments of every ``init`` that Accelerate's own tracker calls from now on."""
    calls: list[tuple[str, dict[str, Any]]] = []
    kind = LOGGER_TYPE_TO_CLASS[name]

    def start(tracker: Any) -> None:
        calls.append((tracker.run_name, tracker.init_kwargs))  # what its ``start`` hands to ``init``
        raise ConnectionError("nothing is sent from here")

    patch.setattr(kind, "start", start)
    patch.setattr("apr_dist.gates.settings.check_trackers", lambda _: None)
    return calls


@pytest.mark.parametrize(
    ("name", "team", "run_name"),
    [("wandb", "entity", "name"), ("swanlab", "workspace", "experiment_name")],
)
def test_a_resumed_run_is_the_same_run_of_the_tracker(
    name: str, team: str, run_name: str, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, run = started(monkeypatch, name), tmp_path / "run"
    filed = ("--tracking.project", "p", "--tracking.entity", "e", "--tracking.group", "g")
    given = flags(inputs, run, "--track", name, *filed, "--tracking.tags", "a, b", "--resume", "auto")
    assert run_here(*given) == 0
    assert run_here(*given) == 0
    assert run_here(*flags(inputs, run, "--track", name, "--overwrite")) == 0
    assert run_here(*flags(inputs, tmp_path / "other", "--track", name)) == 0
    (project, first), (_, resumed), (_, again), (plain, other) = calls
    assert (project, plain) == ("p", "apr-dist")
    expected = {run_name: "run", team: "e", "group": "g", "tags": ["a", "b"], "resume": "allow"}
    assert {key: value for key, value in first.items() if key != "id"} == expected
    assert resumed == first
    assert len({first["id"], again["id"], other["id"]}) == 3
    assert set(other) == {run_name, "id", "resume"}


def test_the_real_wandb_continues_the_run_it_had(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    given = flags(inputs, tmp_path / "run", "--track", "wandb", "--tracking.tags", "a,b")
    assert run_here(*given, "--save-every", "2", "--checkpoint.keep-last", "2") == 0
    shutil.rmtree(tmp_path / "run" / "steps" / "000004")
    again = ("--save-every", "2", "--checkpoint.keep-last", "2", "--resume", "auto")
    assert run_here(*given, *again) == 0
    runs = [path.name.rpartition("-")[2] for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert len(set(runs)) == 1


def test_trackio_resumes_by_a_name_of_its_own(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = started(monkeypatch, "trackio")
    for folder in ("a", "b"):
        given = flags(inputs, tmp_path / folder / "run", "--track", "trackio", "--resume", "auto")
        assert run_here(*given) == run_here(*given) == 0
    names = [arguments["name"] for _, arguments in calls]
    assert names[0] == names[1] != names[2] == names[3]
    assert all(set(arguments) == {"name", "resume"} for _, arguments in calls)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--tracking.entity", "e"), "of the trackers (none) none has it"),
        (("--track", "tensorboard", "--tracking.tags", "a"), "expected one of swanlab, wandb in --track"),
        (("--tracking.team", "e"), "tracking.team"),
    ],
)
def test_a_tracking_key_that_nothing_takes_is_refused(
    given: tuple[str, ...], words: str, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(*flags(inputs, tmp_path / "run", *given)) == ExitCode.USAGE
    assert words.lower() in capsys.readouterr().err.lower()


def test_an_unknown_tracker_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="the nearest to tensorbord is tensorboard"):
        parse_command_line(["--track", "wandb,tensorbord"])
    assert parse_command_line(["--track", "wandb, trackio"]).config.trackers == ("wandb", "trackio")


def test_a_tracker_that_is_not_installed_is_refused_with_the_command(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = next(name for name in ("clearml", "dvclive", "aim", "swanlab") if not _there(name))
    assert run_here(*flags(inputs, tmp_path / "run", "--track", missing)) == 2
    error = capsys.readouterr().err
    assert f"the tracker {missing} is not installed" in error
    assert f"pip install {missing}" in error
    assert not (tmp_path / "run").exists()


def _there(name: str) -> bool:
    try:
        check_trackers((name,))
    except UsageError:
        return False
    return True
