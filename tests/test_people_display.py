"""What a person sees during a run: a picture on a terminal, lines in a log, warnings once and in words."""

from __future__ import annotations

import io
import itertools
import logging
import re
import sys
import warnings
from pathlib import Path

import pytest
from builders.runs import TRAIN, Inputs, run_here
from builders.terminal import Shown, run_in_terminal

from apr_dist.choices import ProgressStyle
from apr_dist.runs.display import (
    Pace,
    PlainDisplay,
    QuietDisplay,
    duration,
    figures_of,
    hear_libraries,
)
from apr_dist.runs.display_choice import choose_style, open_display

STEP = {
    "kind": "step",
    "step": 3,
    "train_loss": 2.0,
    "grad_norm": 1.0,
    "lr": 1e-4,
    "tokens_per_sec": 1234.0,
    "gpu_util_pct": 0.0,
    "wall_ms": 500.0,
    "data_wait_ms": 5.0,
}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def train_in_terminal(inputs: Inputs, run: Path, *flags: str, columns: int, **how: object) -> Shown:
    sizes = ("--num-steps", "4", "--eval-every", "2", "--init", str(inputs.pretrained))
    command = [sys.executable, str(TRAIN), *inputs.data_flags(), "--run-dir", str(run), *sizes, *flags]
    return run_in_terminal(command, columns=columns, **how)  # type: ignore[arg-type]


def without_spaces(text: str) -> str:
    """A text whatever the column at which the terminal broke its lines, which may be inside a word."""
    return "".join(text.split())


@pytest.mark.parametrize("columns", [140, 36])
def test_a_terminal_shows_a_picture_that_fits_it_with_every_sentence_above(
    inputs: Inputs, tmp_path: Path, columns: int
) -> None:
    shown = train_in_terminal(inputs, tmp_path / "run", columns=columns)
    assert shown.code == 0
    assert shown.text.count("step 4/4") == 1, "one picture is left, not a trail of them"
    picture = shown.text.index("step 4/4")
    before, after = shown.text[:picture], shown.text[picture:]
    joined = " ".join(before.split())
    assert joined.count("gate passed") == 7
    assert joined.count("validation loss") == 3
    for figure in ("smoothed", "validation", "grad norm", "tokens/s", "MFU", "memory", "data wait", "left"):
        assert figure in after.split("Verdict")[0]
    assert "Verdict" in after
    assert "COMPLETED" in after
    assert b"\x1b[?25l" in shown.raw
    assert shown.raw.rindex(b"\x1b[?25h") > shown.raw.rindex(b"\x1b[?25l"), "the cursor is shown again"
    assert all(word.encode() in shown.raw for word in ("loading weights", "looking at every value"))
    assert not any(word in shown.text for word in WORK), "bars of the start go when it is over"


def test_an_interrupted_run_leaves_the_terminal_clean_and_its_picture_complete(
    inputs: Inputs, tmp_path: Path
) -> None:
    shown = train_in_terminal(
        inputs,
        tmp_path / "run",
        *("--num-steps", "100000", "--eval-every", "100000"),
        columns=100,
        interrupt_when=lambda raw: b"step 5" in raw,
    )
    assert shown.code == 130
    assert shown.raw.rindex(b"\x1b[?25h") > shown.raw.rindex(b"\x1b[?25l")
    assert ": stopped" in shown.text
    below = without_spaces(shown.text.split(": stopped")[1])
    assert without_spaces("SIGINT was received") in below, "the error stands below the picture"
    assert without_spaces("with the same command and --resume auto.") in below


def test_a_refusal_on_a_terminal_draws_no_picture(inputs: Inputs, tmp_path: Path) -> None:
    shown = train_in_terminal(inputs, tmp_path / "run", "--seq-length", "100000", columns=100)
    assert shown.code != 0
    assert "passed, " not in shown.text
    assert "error: " in shown.text


WORK = (
    "checking the file",
    "hashing the file",
    "looking at every value",
    "loading weights",
    "proving weights",
)


def test_a_log_shows_how_far_a_long_start_is(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count()
    monkeypatch.setattr("apr_dist.runs.display.monotonic", lambda: float(next(seconds)))
    flags = (
        *inputs.data_flags(),
        "--init",
        str(inputs.pretrained),
        "--num-steps",
        "1",
        "--progress",
        "plain",
    )
    assert run_here(*flags, "--run-dir", str(tmp_path / "run")) == 0
    shown = capsys.readouterr().out.splitlines()
    first_step = next(index for index, line in enumerate(shown) if line.startswith("step "))
    shares: dict[str, list[int]] = {}
    for line in shown[:first_step]:
        if told := re.fullmatch(r"  (.*): (\d+) %", line):
            shares.setdefault(told[1], []).append(int(told[2]))
    assert {"looking at every value", "loading weights", "proving weights"} <= set(shares) <= set(WORK)
    for found in shares.values():
        assert found == sorted(set(found))
        assert 0 <= found[0] <= found[-1] <= 100
    assert "loading weights" not in (tmp_path / "run" / "train.log").read_text()
    assert run_here(*flags, "--run-dir", str(tmp_path / "run"), "--resume", "auto") == 0
    resumed = capsys.readouterr().out
    shares_read = list(map(int, re.findall(r"  comparing the saved step with its digests: (\d+) %", resumed)))
    assert shares_read
    assert shares_read == sorted(shares_read)


def test_progress_of_a_start_is_written_after_a_second_then_every_five(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr("apr_dist.runs.display.monotonic", lambda: now)
    stream = io.StringIO()
    display = PlainDisplay(stream)
    for tenth in range(300):
        now = tenth / 10
        display.working("loading weights", tenth, 300)
        display.working("hashing", 300, 300)
    lines = stream.getvalue().splitlines()
    loading = [int(line.split(": ")[1].removesuffix(" %")) for line in lines if "loading" in line]
    assert loading == [3, 20, 36, 53, 70, 86]  # at 1, 6, 11, ... of 30 seconds


@pytest.mark.parametrize("variable", ["NO_COLOR", "CI"])
def test_no_color_and_ci_ask_for_plain_lines(variable: str) -> None:
    assert choose_style(ProgressStyle.AUTO, Terminal(), {"TERM": "xterm"}) is ProgressStyle.RICH
    assert choose_style(ProgressStyle.AUTO, Terminal(), {variable: "1"}) is ProgressStyle.PLAIN
    assert choose_style(ProgressStyle.AUTO, Terminal(), {"TERM": "dumb"}) is ProgressStyle.PLAIN
    assert choose_style(ProgressStyle.AUTO, io.StringIO(), {}) is ProgressStyle.PLAIN
    assert choose_style(ProgressStyle.RICH, io.StringIO(), {variable: "1"}) is ProgressStyle.RICH


def test_a_log_has_a_line_a_step_and_no_escape_codes(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--init", str(inputs.pretrained), "--num-steps", "3", "--run-dir", str(tmp_path / "run"))
    assert run_here(*inputs.data_flags(), *flags) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    lines = [line for line in out.splitlines() if "/3  loss" in line]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert all("MFU n/a" in line and re.search(r"left \d+:\d\d:\d\d", line) for line in lines)


def test_quiet_shows_warnings_and_the_verdict_alone(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--init", str(inputs.pretrained), "--num-steps", "1", "--run-dir", str(tmp_path / "run"))
    assert run_here(*inputs.data_flags(), *flags, "--progress", "quiet") == 0
    out = capsys.readouterr().out
    said = [line for line in out.splitlines() if not line.startswith("warning: ")]
    assert said[1] == "Verdict"
    assert "gate passed:" not in out
    assert "validation loss 3" not in out


def test_quiet_lets_warnings_through() -> None:
    stream = io.StringIO()
    display = QuietDisplay(stream, prefix="[SYNTHETIC] ")
    display("a gate passed")
    display.warn("the disk is nearly full")
    assert stream.getvalue() == "[SYNTHETIC] warning: the disk is nearly full\n"


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    display = open_display(ProgressStyle.RICH, rank=1, synthetic=False)
    display("a sentence")
    display.warn("a warning")
    display.measured(STEP)
    assert capsys.readouterr().out == ""


def test_what_libraries_say_is_shown_once_in_words() -> None:
    stream = io.StringIO()
    with hear_libraries(PlainDisplay(stream)):
        for _ in range(3):
            warnings.warn_explicit(
                "the  flag\n is old", FutureWarning, "/venv/site-packages/torch/nn/x.py", 7, registry={}
            )
            logging.getLogger("accelerate.state").warning("no %s found", "GPU")
    assert stream.getvalue() == (
        "warning: torch says: the flag is old\nwarning: accelerate says: no GPU found\n"
    )


def test_the_pace_knows_the_time_left() -> None:
    pace = Pace(steps=10, eval_every=4, done=2)
    assert pace.left_s is None
    pace.evaluation({"wall_ms": 3000.0})
    pace.step(STEP)
    assert pace.left_s == pytest.approx(7 * 0.5 + 3 * 3.0), "seven steps, evaluations after 4, 8 and 10"
    assert pace.smoothed_loss == pytest.approx(2.0)
    assert duration(3725.4) == "1:02:05"


def test_figures_that_nobody_measured_are_not_guessed() -> None:
    figures = figures_of(STEP, Pace(steps=10, eval_every=4))
    assert figures["MFU"] == figures["memory"] == "n/a"
    assert figures["data wait"] == "1.0 %"
