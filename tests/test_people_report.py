"""The page of one or more runs: whole in itself, complete, and there for runs that went wrong."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.browser import open_browser
from builders.files import write_without_tokenizer
from builders.runs import Inputs, run_here, verdict
from matplotlib.figure import Figure

from apr_dist.cli import main
from apr_dist.cli.report import report
from apr_dist.data.manifest import Manifest
from apr_dist.errors import UsageError
from apr_dist.interop.text_model import open_text_model
from apr_dist.model.generation import Sampling
from apr_dist.report.figures import FIGURES, LIGHT, plot_runs, smooth
from apr_dist.report.run_folder import config_differences, read_runs
from apr_dist.report.samples import make_samples

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


def page_of(*runs: Path, output: Path, **options: Any) -> str:
    """The page of these runs, without samples unless a test wants them."""
    report(runs, output=output, **{"samples": 0, **options})
    return output.read_text()


def test_the_page_holds_everything_it_shows(inputs: Inputs, tmp_path: Path) -> None:
    page = page_of(copied(inputs, tmp_path / "run"), output=tmp_path / "out.html")
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    pictures = sorted(path.name for path in tmp_path.glob("out-*.png"))
    assert len(pictures) >= 6
    assert len(sources) == 2 * len(pictures), "each figure for a light and a dark page"
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    text = re.sub(r"base64,[A-Za-z0-9+/=]*", "", page)
    assert not re.search(r"https?:|//|@import|url\(|<script|<link", text)
    assert {"out-loss.png", "out-phases.png", "out-data-wait.png"} <= set(pictures)
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


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure[0])
def test_no_run_reaches_beyond_the_edge_of_a_figure(figure: Any, tmp_path: Path) -> None:
    runs = []
    for name, factor in (("low", 1.0), ("high", 3.0), ("middle", 2.0)):
        run = tmp_path / name
        run.mkdir()
        more = {"mfu": 0.1, "memory_bytes": 10**9, "data_wait_ms": 1.0}
        line: dict[str, Any] = {
            key: value * factor for key, value in (STEP | more).items() if isinstance(value, int | float)
        }
        line["router"] = {"load_max": 2 * factor, "balance_loss": factor}
        lines = [{**line, "kind": "step", "step": step, "wall_ms": 10.0} for step in (1, 2)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
        runs.append(run)
    axes = Figure().subplots()
    assert plot_runs(axes, read_runs(runs), figure[-1], LIGHT)
    low, high = axes.get_ylim()
    assert len(axes.lines) == 3
    for drawn in axes.lines:
        assert low <= min(drawn.get_ydata()) <= max(drawn.get_ydata()) < high


def phases_of(folder: Path) -> dict[str, float]:
    """Its phases that took any time, in seconds."""
    return {phase: took for phase, took in read_runs([folder])[0].phases_s.items() if took}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({}, {"forward, backward, update": 0.0099, "waiting for data": 0.0001}),
        (
            {"forward_ms": 3.0, "backward_ms": 5.0, "update_ms": 1.0},
            {
                "forward": 0.003,
                "backward": 0.005,
                "update": 0.001,
                "rest of the steps": 0.0009,
                "waiting for data": 0.0001,
            },
        ),
        (
            {"forward_ms": 3.0, "backward_ms": 5.0, "update_ms": 2.0},
            {"forward": 0.003, "backward": 0.005, "update": 0.002},
        ),
    ],
    ids=["a version that did not tell them apart", "all parts", "a wait that hid behind computing"],
)
def test_phases_add_up_to_what_the_lines_took(
    tmp_path: Path, parts: dict[str, float], expected: dict[str, float]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = [
        {"kind": "load", "step": 0, "wall_ms": 500.0},
        {**STEP, **parts, "step": 1, "memory_bytes": 812_000_000},
    ]
    lines += [{"kind": "evaluation", "step": 1, "val_loss": 2.0, "wall_ms": 40.0}]
    lines += [{"kind": "save", "step": 1, "wall_ms": 60.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = {**expected, "evaluating": 0.04, "saving": 0.06, "loading": 0.5}
    assert phases_of(run) == pytest.approx(expected)
    page = page_of(run, output=tmp_path / "out.html")
    assert "<dt>peak memory</dt><dd>0.81 GB</dd>" in page
    assert (tmp_path / "out-memory.png").exists()


def test_a_run_records_where_its_time_went(inputs: Inputs, tmp_path: Path) -> None:
    names = {"forward", "backward", "update", "rest of the steps", "waiting for data"}
    assert set(phases_of(inputs.pretrained_run)) == {*names, "evaluating", "saving", "loading"}
    old = copied(inputs, tmp_path / "old")
    lines = [json.loads(line) for line in (old / "metrics.jsonl").read_text().splitlines()]
    for key in ("forward_ms", "backward_ms", "update_ms"):
        assert all(line.pop(key) > 0 for line in lines if line["kind"] == "step")
    (old / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    together = {"forward, backward, update", "waiting for data"}
    assert set(phases_of(old)) == {*together, "evaluating", "saving", "loading"}
    report((inputs.pretrained_run, old), output=tmp_path / "out.html", samples=0)
    assert (tmp_path / "out-phases.png").exists()


@pytest.fixture(scope="module")
def tuned(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run from the pretrained model, whole, so that both of its models can be asked."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    flags = ("--init", str(inputs.pretrained), "--num-steps", "6", "--lr", "1e-2", "--warmup-steps", "0")
    assert run_here(*inputs.data_flags(), *flags, "--run-dir", str(run)) == 0
    return run


def test_the_page_shows_what_the_model_says_before_and_after(
    inputs: Inputs, tuned: Path, tmp_path: Path
) -> None:
    page = page_of(tuned, output=tmp_path / "out.html", prompt=("import <os>", "def f"), samples=None)
    assert '<pre class="prompt">import &lt;os&gt;</pre>' in page
    assert page.count("<h3>before training</h3>") == page.count("<h3>after training</h3>") == 2
    assert "No samples" not in page
    samples = make_samples(read_runs([tuned])[0], count=3)
    assert len(samples.rows) == 3
    speaker = open_text_model(inputs.pretrained, tokenizer=inputs.tokenizer)
    first = samples.rows[0]
    pieces = speaker.speak(speaker.encode(first.prompt), Sampling(max_new_tokens=48))
    assert first.before == "".join(piece.text for piece in pieces)
    assert any(row.before != row.after for row in samples.rows)
    held_out = Manifest.load(inputs.validation)
    ids = np.fromfile(held_out.path_of(held_out.shards[0]), dtype="<u4", count=24)
    assert first.prompt == speaker.tokenizer.decode(ids.tolist())


def test_why_there_are_no_samples_is_said(inputs: Inputs, tuned: Path, tmp_path: Path) -> None:
    run = copied(inputs, tmp_path / "run")
    notes = make_samples(read_runs([run])[0], count=1).notes
    assert notes[0] == f"No samples after training: {run / 'checkpoint.apr'} is not there."
    assert notes[1] == "No samples before training: the run began from random weights."
    other = tmp_path / "other"
    shutil.copytree(tuned, other, ignore=shutil.ignore_patterns("*.apr", "steps"))
    shutil.copy(inputs.pretrained, other / "checkpoint.apr")
    found = verdict(other)
    found["facts"]["init_digest"] = "sha256:of-another-file"
    (other / "verdict.json").write_text(json.dumps(found))
    after, before = make_samples(read_runs([other])[0], count=1).notes
    assert "are not the ones the verdict names" in after
    assert "is not the file the run began with" in before


def test_the_fix_for_a_run_without_tokenizer_works(
    inputs: Inputs, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tuned, run, ignore=shutil.ignore_patterns("*.apr", "steps"))
    write_without_tokenizer(inputs.pretrained, run / "checkpoint.apr")
    config = re.sub(r"(?m)^(tokenizer|init): .*$", r"\1: null", (run / "config.yaml").read_text())
    (run / "config.yaml").write_text(config)
    (run / "verdict.json").unlink()
    page = html.unescape(page_of(run, output=tmp_path / "out.html", samples=1, prompt=("def f",)))
    (command,) = re.findall(r"apr-dist (tokenize import-hf) FOLDER -o (\S+), with the folder", page)
    assert "no tokenizer inside the file or beside it" in page
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(inputs.tokenizer / "tokenizer.json", folder)
    assert main([*command[0].split(), str(folder), "-o", command[1]]) == 0
    page = page_of(run, output=tmp_path / "out.html", samples=1, prompt=("def f",))
    assert page.count("<h3>after training</h3>") == 1
    assert "No samples after" not in page


@pytest.mark.parametrize("width", [1280, 390], ids=["desk", "phone"])
def test_a_browser_shows_the_whole_page_in_light_and_dark_and_asks_for_nothing(
    inputs: Inputs, tmp_path: Path, width: int
) -> None:
    first, second = copied(inputs, tmp_path / "first"), copied(inputs, tmp_path / ("second-" + "x" * 60))
    page = tmp_path / "out.html"
    page_of(first, second, output=page)
    shots = {}
    with open_browser(tmp_path / "profile") as browser:
        for dark in (False, True):
            browser.show(page, width=width, dark=dark)
            assert browser.ask("document.documentElement.scrollWidth") <= width, "nothing is beyond the edge"
            widths = browser.ask("[...document.images].map(image => image.complete && image.naturalWidth)")
            assert len(widths) >= 6
            assert all(found > 500 for found in widths)
            shots[dark] = browser.screenshot(tmp_path / f"{width}-{dark}.png")
            colour = browser.ask("getComputedStyle(document.body).backgroundColor")
            assert colour == ("rgb(14, 17, 22)" if dark else "rgb(243, 245, 248)")
            used = browser.ask("document.images[0].currentSrc === document.images[0].src")
            assert used is not dark, "a dark page has dark pictures"
    assert all(shot.startswith(b"\x89PNG") and len(shot) > 20_000 for shot in shots.values())
    assert {address.split(":")[0] for address in browser.requested} <= {"file", "data"}
    assert {address for address in browser.requested if address.startswith("file")} == {page.as_uri()}


@pytest.mark.parametrize("count", [1, 2, 3, 19, 20, 137, 1000, 5000])
def test_smoothing_neither_lags_nor_leads_and_is_the_mean_it_says(count: int) -> None:
    noise = np.random.default_rng(count).normal(size=count)
    means, window = smooth(noise.tolist())
    assert window == 2 * min(max(count // 20, 1), 50) + 1
    half = window // 2
    for place, found in enumerate(means):
        before = min(half, place // 4)
        around = np.arange(place - before, min(place + before, count - 1) + 1)
        line = np.polynomial.Polynomial.fit(around, noise[around], 1) if before else None
        assert found == pytest.approx(line(place) if line else noise[place], abs=1e-9)
    if count > 5 * window:
        inner = np.convolve(noise, np.full(window, 1 / window), mode="valid")
        assert means[4 * half : count - half] == pytest.approx(inner[3 * half :].tolist(), abs=1e-9)
    falling = [11.0 - 0.1 * step for step in range(count)]
    assert smooth(falling)[0] == pytest.approx(falling, abs=1e-9), "a straight line stays where it is"


def test_a_smoothed_loss_follows_a_steep_start() -> None:
    loss = [3.0 + 8.0 * float(np.exp(-step / 6)) for step in range(1, 201)]
    means, _ = smooth(loss)
    assert max(abs(mean - right) for mean, right in zip(means, loss, strict=True)) < 0.15


def test_the_loss_picture_names_what_it_draws_and_draws_validation_as_points(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    rng = np.random.default_rng(0)
    losses = [3.0 + 8.0 * float(np.exp(-step / 6)) + float(rng.normal(0, 0.2)) for step in range(200)]
    lines = [json.dumps({**STEP, "step": step, "train_loss": loss}) for step, loss in enumerate(losses, 1)]
    lines += [
        json.dumps({"kind": "evaluation", "step": step, "val_loss": 3.0 + 80 / (step + 10), "wall_ms": 1.0})
        for step in (0, 50, 100, 150, 200)
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    axes = Figure().subplots()
    assert plot_runs(axes, read_runs([run]), FIGURES[0][-1], LIGHT)
    labels = [line.get_label() for line in axes.lines]
    assert labels == ["run: training, each step", "run: mean of up to 21 around", "run: validation"]
    raw, mean, validation = axes.lines
    assert list(raw.get_ydata()) == losses
    assert mean.get_ydata()[9] == pytest.approx(np.mean(losses[7:12]))
    assert list(validation.get_xdata()) == [0, 50, 100, 150, 200]
    assert validation.get_linestyle() == "None"
    assert validation.get_marker() == "o"
    report((run,), output=tmp_path / "out.html", samples=0)
    assert (tmp_path / "out-loss.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("metrics.jsonl", b"[1]\n", "it holds a JSON list"),
        ("metrics.jsonl", b"nonsense\n", "not JSON"),
        ("metrics.jsonl", b"\xff\xfe\n", "it cannot be read"),
        ("verdict.json", b'{"status": "OK"}', "detail, exit_code, gates, facts is missing"),
    ],
)
def test_files_that_no_run_wrote_are_refused_by_name(
    tmp_path: Path, name: str, content: bytes, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert name in error
    assert not (tmp_path / "report.html").exists()


def test_wrong_flags_and_places_are_refused(
    tmp_path: Path, inputs: Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path / "none")]) == 2
    assert main(["report", str(inputs.pretrained_run), "--samples", "-1"]) == 2
    somewhere = str(tmp_path / "no" / "such" / "folder" / "page.html")
    assert main(["report", str(inputs.pretrained_run), "--samples", "0", "-o", somewhere]) == 6
    error = capsys.readouterr().err
    assert "neither metrics.jsonl nor verdict.json" in error
    assert "-1 samples" in error
    assert "page.html" in error
