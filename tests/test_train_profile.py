"""The verb that says where a step goes: phases that add up, operators, a trace; nothing else is left."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from apr_dist.cli import main
from apr_dist.errors import ExitCode
from apr_dist.model.kernels.loss import IGNORE_INDEX
from apr_dist.parallel.engine import ReplicaEngine
from apr_dist.parallel.runtime import reset_state
from apr_dist.training.profiling import PHASES, TRACED_STEPS

if TYPE_CHECKING:
    from builders.runs import Inputs


def profile(inputs: Inputs, folder: Path, *flags: str) -> int:
    reset_state()
    try:
        start = ("--init", str(inputs.pretrained), "--run-dir", str(folder))
        return main(["profile", *inputs.data_flags(), *start, *flags])
    finally:
        reset_state()


def test_a_profile_leaves_a_trace_and_a_page_whose_phases_add_up(inputs: Inputs, tmp_path: Path) -> None:
    folder = tmp_path / "profile"
    start = ["--init", str(inputs.pretrained), "--run-dir", str(folder)]
    flags = ["--steps", "3", "--micro-batch-size", "2"]
    # in a process of its own: how much the profiler says is settled once, at its first use
    done = subprocess.run(
        [sys.executable, "-m", "apr_dist", "profile", *inputs.data_flags(), *start, *flags],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    page = (folder / "summary.md").read_text()
    assert page in done.stdout
    assert "profiler" not in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["summary.md", "trace.json"]
    shares = {name: float(share) for name, share in re.findall(r"\| (\w+) \| [\d.,]+ \| ([\d.]+) %", page)}
    assert list(shares) == list(PHASES)
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    assert min(shares[name] for name in ("forward", "loss", "backward", "update")) > 0
    assert re.search(r"\| aten::\w+ \|", page)
    assert "MFU n/a" in page
    names = {event.get("name") for event in json.loads((folder / "trace.json").read_text())["traceEvents"]}
    assert set(PHASES) - {"other"} <= names
    assert "107,072 parameters" in page
    assert "loss chunked" in page
    assert "as single over 1 process(es), f32" in page


def test_the_phases_of_a_trace_do_not_overlap(inputs: Inputs, tmp_path: Path) -> None:
    assert profile(inputs, tmp_path / "profile", "--steps", "1", "--micro-batch-size", "2") == 0
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    phases = [event for event in events if event.get("name") in PHASES and event.get("ph") == "X"]
    spans = sorted((event["ts"], event["ts"] + event["dur"], event["name"]) for event in phases)
    micro_batch = ["forward", "loss", "backward"]
    assert [name for _, _, name in spans] == ["data", *micro_batch, *micro_batch, "update"] * TRACED_STEPS
    for (_, end, _), (begin, _, _) in pairwise(spans):
        assert end <= begin


def test_a_profile_is_of_the_run_that_is_configured(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, bool]] = []
    accumulate = ReplicaEngine.accumulate

    def watched(engine: ReplicaEngine, *given: Any, **named: Any) -> Any:
        seen.append((given[2] is not None, bool((given[1] == IGNORE_INDEX).any())))
        return accumulate(engine, *given, **named)

    monkeypatch.setattr(ReplicaEngine, "accumulate", watched)
    flags = ["--steps", "1", "--loader.documents", "isolate", "--optimizer.state-bits", "8"]
    flags += ["--loader.ignored-ids", ",".join(map(str, range(60, 260)))]
    assert profile(inputs, tmp_path / "profile", *flags) == 0
    assert all(isolated for isolated, _ in seen)
    assert any(ignored for _, ignored in seen)
    page = (tmp_path / "profile" / "summary.md").read_text()
    assert "documents isolated" in page
    assert "state in 8 bits" in page
    assert "less is computed where documents are isolated" in page


def test_a_profile_asks_the_gates_and_refuses_no_steps(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert profile(inputs, tmp_path / "profile", "--steps", "0") == ExitCode.USAGE
    assert profile(inputs, tmp_path / "profile", "--batch-size", "3", "--micro-batch-size", "2") != 0
    assert "--steps is 0" in capfd.readouterr().err
    assert not (tmp_path / "profile").exists()
