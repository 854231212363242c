"""The verb that says where a step goes: phases that add up, operators, a trace; nothing else is left."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from apr_dist.cli import main
from apr_dist.errors import ExitCode
from apr_dist.parallel.runtime import reset_state
from apr_dist.training.profiling import PHASES

if TYPE_CHECKING:
    from builders.runs import Inputs


def profile(inputs: Inputs, folder: Path, *flags: str) -> int:
    reset_state()
    try:
        start = ("--init", str(inputs.pretrained), "--run-dir", str(folder))
        return main(["profile", *inputs.data_flags(), *start, *flags])
    finally:
        reset_state()


def test_a_profile_leaves_a_trace_and_a_page_whose_phases_add_up(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "profile"
    assert profile(inputs, folder, "--steps", "3", "--micro-batch-size", "2") == 0
    page = (folder / "summary.md").read_text()
    assert page in capfd.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["summary.md", "trace.json"]
    shares = {name: float(share) for name, share in re.findall(r"\| (\w+) \| [\d.,]+ \| ([\d.]+) %", page)}
    assert list(shares) == list(PHASES)
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    assert min(shares[name] for name in ("forward", "loss", "backward", "update")) > 0
    assert re.search(r"\| aten::\w+ \|", page)
    assert "MFU n/a" in page
    names = {event.get("name") for event in json.loads((folder / "trace.json").read_text())["traceEvents"]}
    assert {"data", "backward", "update"} <= names


def test_a_profile_asks_the_gates_and_refuses_no_steps(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert profile(inputs, tmp_path / "profile", "--steps", "0") == ExitCode.USAGE
    assert profile(inputs, tmp_path / "profile", "--batch-size", "3", "--micro-batch-size", "2") != 0
    assert "--steps is 0" in capfd.readouterr().err
    assert not (tmp_path / "profile").exists()
