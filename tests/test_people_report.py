"""The page of one or more runs: whole in itself, complete, and there for runs that went wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from builders.runs import Inputs, verdict

from apr_dist.cli.report import report
from apr_dist.errors import UsageError
from apr_dist.report.figures import smooth
from apr_dist.report.run_folder import config_differences, read_runs

STEP = {
    "kind": "step",
    "train_loss": 3.0,
    "grad_norm": 1.0,
    "lr": 1e-4,
    "tokens_per_sec": 1000.0,
    "wall_ms": 10.0,
    "data_wait_ms": 0.1,
    "tokens_seen": 64,
}


def copied(inputs: Inputs, target: Path) -> Path:
    """A run folder that a test may change: the shared pretrained run without its weights."""
    shutil.copytree(inputs.pretrained_run, target, ignore=shutil.ignore_patterns("*.apr", "steps"))
    return target


def page_of(*runs: Path, output: Path) -> str:
    """The page of these runs."""
    report(runs, output=output)
    return output.read_text()


def test_the_page_holds_everything_it_shows(inputs: Inputs, tmp_path: Path) -> None:
    page = page_of(copied(inputs, tmp_path / "run"), output=tmp_path / "out.html")
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert len(sources) == 10, "five figures, each for a light and a dark page"
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    text = re.sub(r"base64,[A-Za-z0-9+/=]*", "", page)
    assert not re.search(r"https?:|//|@import|url\(|<script|<link", text)
    pictures = sorted(path.name for path in tmp_path.glob("out-*.png"))
    assert "out-loss.png" in pictures
    assert (tmp_path / "out-loss.png").read_bytes().startswith(b"\x89PNG")


def test_every_gate_and_its_result_is_in_the_page(inputs: Inputs, tmp_path: Path) -> None:
    run = copied(inputs, tmp_path / "run")
    page = page_of(run, output=tmp_path / "out.html")
    gates = verdict(run)["gates"]
    assert len(gates) > 5
    for gate in gates:
        assert gate["id"] in page
        assert gate["gate"] in page
    assert page.count('class="result') == len(gates)


def test_a_failed_gate_and_an_aborted_run_show_as_such(inputs: Inputs, tmp_path: Path) -> None:
    run = copied(inputs, tmp_path / "run")
    found = verdict(run)
    found |= {"status": "ABORTED", "exit_code": 10, "detail": "loss is <NaN>", "facts": {}}
    found["gates"][0]["passed"] = False
    (run / "verdict.json").write_text(json.dumps(found))
    (run / "metrics.jsonl").write_text("")
    page = page_of(run, output=tmp_path / "out.html")
    assert '<span class="badge bad">ABORTED' in page
    assert ">FAIL</td>" in page
    assert "loss is &lt;NaN&gt;" in page
    assert "No step was recorded." in page


def test_a_run_without_evaluations_or_verdict_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = [json.dumps({**STEP, "step": step}) for step in (1, 2)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "st')
    page = page_of(run, output=tmp_path / "out.html")
    assert "NO VERDICT" in page
    assert "never evaluated" in page
    assert (tmp_path / "out-loss.png").exists()


def test_several_runs_are_overlaid_and_their_configurations_compared(inputs: Inputs, tmp_path: Path) -> None:
    first, second = copied(inputs, tmp_path / "first"), copied(inputs, tmp_path / "second")
    config = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(config.replace("seed: 7", "seed: 8"))
    assert config_differences(read_runs([first, second])) == [("seed", ["7", "8"])]
    page = page_of(first, second, output=tmp_path / "out.html")
    assert "Gates of first" in page
    assert '<td data-label="key">seed</td><td data-label="first">7</td>' in page


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"neither metrics\.jsonl nor verdict\.json"):
        report((tmp_path,))
    with pytest.raises(UsageError, match="no run folder"):
        report(())


def test_smoothing_is_not_pulled_towards_its_start() -> None:
    assert smooth([5.0, 5.0, 5.0]) == pytest.approx([5.0, 5.0, 5.0])
    assert smooth([0.0] * 50 + [1.0])[-1] == pytest.approx(0.1, rel=0.01)
