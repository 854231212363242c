"""What the regression guard says of ratios that were made up: nothing is measured here."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load() -> ModuleType:
    spec = spec_from_file_location("recorded_ratios", BENCHMARKS / "recorded_ratios.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


recorded_ratios = load()

STEP, BYTES = "step, f32", "bytes: loss"
MEASURED = {STEP: [0.5, 0.6, 0.7], BYTES: [0.1]}


@pytest.fixture
def record(tmp_path: Path) -> Path:
    path = tmp_path / "recorded.json"
    assert recorded_ratios.guard(lambda: MEASURED, path, record=True) == 0
    return path


def changed(record: Path, *keys: str, to: Any) -> None:
    """Give the record another value under these keys; None takes it away."""
    facts = part = json.loads(record.read_text())
    for key in keys[:-1]:
        part = part[key]
    if to is None:
        del part[keys[-1]]
    else:
        part[keys[-1]] = to
    record.write_text(json.dumps(facts))


def never() -> dict[str, list[float]]:
    raise AssertionError("measured, although there is nothing to compare with")


def test_a_record_holds_each_range_and_what_it_was_measured_on(record: Path) -> None:
    facts = json.loads(record.read_text())
    assert facts["ratios"][STEP] == {"median": 0.6, "min": 0.5, "max": 0.7}
    assert facts["measured_on"].keys() == {"processor", "threads", "torch"}
    assert all(facts["measured_on"].values())


@pytest.mark.parametrize(
    ("step", "code", "verdict"),
    [
        ([0.73], 0, "as before"),
        ([0.74], 1, "WORSE"),
        ([0.6, 0.6, 9.0], 0, "as before"),
        ([0.48], 0, "as before"),
        ([0.47], 0, "better"),
    ],
)
def test_a_median_five_percent_above_the_recorded_range_is_a_regression(
    record: Path, capsys: pytest.CaptureFixture[str], step: list[float], code: int, verdict: str
) -> None:
    assert recorded_ratios.guard(lambda: MEASURED | {STEP: step}, record, record=False) == code
    out, err = capsys.readouterr()
    assert [verdict in line for line in out.splitlines() if line.startswith(STEP)] == [True]
    assert (f"regression: {STEP}" in err) == bool(code)


@pytest.mark.parametrize(("ratio", "code"), [(0.1005, 0), (0.102, 1)])
def test_bytes_may_grow_by_one_percent(record: Path, ratio: float, code: int) -> None:
    assert recorded_ratios.guard(lambda: MEASURED | {BYTES: [ratio]}, record, record=False) == code


def test_a_new_ratio_is_said_to_be_new(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recorded_ratios.guard(lambda: MEASURED | {"step, f16": [3.0]}, record, record=False) == 0
    assert "new: record it" in capsys.readouterr().out


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_recorded_ratio_that_is_no_longer_measured_is_a_failure(
    record: Path, capsys: pytest.CaptureFixture[str], elsewhere: bool
) -> None:
    if elsewhere:
        changed(record, "measured_on", "processor", to="an abacus")
    assert recorded_ratios.guard(lambda: {STEP: [0.6]}, record, record=False) == 1
    assert f"no longer measured: {BYTES}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "other"), [("processor", "an abacus"), ("threads", 10_000), ("torch", "0.4")]
)
def test_on_another_machine_the_table_is_shown_and_nothing_is_judged(
    record: Path, capsys: pytest.CaptureFixture[str], key: str, other: Any
) -> None:
    changed(record, "measured_on", key, to=other)
    assert recorded_ratios.guard(lambda: MEASURED | {STEP: [9.0]}, record, record=False) == 0
    out = capsys.readouterr().out
    assert "not judged: recorded on " in out
    assert str(other) in out
    assert "9.000" in out
    assert "WORSE" not in out


@pytest.mark.parametrize(
    ("keys", "to", "message"),
    [
        (("ratios",), None, "not an object of measured_on and ratios"),
        (("ratios",), {}, "there is no ratio"),
        (("ratios",), [STEP], "there is no ratio"),
        (("measured_on",), "here", "does not name processor"),
        (("measured_on", "threads"), None, "does not name processor"),
        (("measured_on", "threads"), "two", "does not name processor"),
        (("ratios", STEP), 0.6, "has not exactly median, min, max"),
        (("ratios", STEP, "max"), None, "has not exactly median, min, max"),
        (("ratios", STEP, "max"), "0.7", "not a number"),
        (("ratios", STEP, "max"), True, "not a number"),
        (("ratios", STEP, "max"), float("nan"), "not a number"),
        (("ratios", STEP, "max"), 0.55, "outside its range"),
        (("ratios", STEP, "min"), -1, "not positive"),
    ],
)
def test_a_record_of_another_shape_is_refused_before_anything_is_measured(
    record: Path, capsys: pytest.CaptureFixture[str], keys: tuple[str, ...], to: Any, message: str
) -> None:
    changed(record, *keys, to=to)
    assert recorded_ratios.guard(never, record, record=False) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(record) in line
    assert message in line


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_record_that_is_not_json_is_refused(
    record: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    record.write_bytes(content)
    assert recorded_ratios.guard(never, record, record=False) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("name", ["nowhere.json", "."])
def test_a_record_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert recorded_ratios.guard(never, tmp_path / name, record=False) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_record_beside_the_benchmark_can_be_compared_with() -> None:
    shipped = recorded_ratios.read(BENCHMARKS / "recorded.json")
    as_recorded = {name: [row["median"]] for name, row in shipped.ratios.items()}
    assert recorded_ratios.compare(as_recorded, shipped, shipped.machine) == 0
    slower = as_recorded | {STEP: [2 * shipped.ratios[STEP]["max"]]}
    assert recorded_ratios.compare(slower, shipped, shipped.machine) == 1
    assert recorded_ratios.compare(slower, shipped, replace(shipped.machine, threads=99)) == 0


def test_a_record_that_a_stall_stretched_is_not_written(
    record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = record.read_bytes()
    stalled = {**MEASURED, STEP: [0.5, 0.6, 13.0]}
    assert recorded_ratios.guard(lambda: stalled, record, record=True) == 2
    assert f"{STEP} stalled" in capsys.readouterr().err
    assert record.read_bytes() == before


def test_the_benchmark_of_files_runs_and_prints_what_reading_back_an_export_costs(tmp_path: Path) -> None:
    script = BENCHMARKS / "bench_files.py"
    command = [
        sys.executable,
        str(script),
        "--megabytes",
        "1",
        "--rounds",
        "1",
        "--json",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("export to GGUF, read back")]
    seconds = json.loads((tmp_path / "out").read_text())["seconds"][
        "export to GGUF, read back / the same, not read back"
    ]
    assert f"ratio {seconds['ours'][0] / seconds['theirs'][0]:5.2f}" in row
