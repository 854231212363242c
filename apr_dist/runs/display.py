"""What a person sees while a run goes on: sentences, and the lines of metrics.jsonl in words.

Here are the plain and the quiet display, and what other libraries have to say. Which one a run has is chosen
in ``display_choice``, the live picture of a terminal is in ``live_display``, and the figures come from
``metrics``. Nothing here imports PyTorch: the gates speak before it is loaded.
"""

from __future__ import annotations

import logging
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, TextIO

SMOOTHING = 0.9
"""Weight of the past in the smoothed training loss."""

NOT_AVAILABLE = "n/a"
_RECENT_STEPS = 50
_LONGEST_WARNING = 400
_LONGEST_SAID = 200
_FIRST_WORD_S = 1.0
_WORDS_APART_S = 5.0


@dataclass
class Pace:
    """Where the steps of a run stand and what they cost lately: the smoothed loss, the time left.

    Attributes:
        steps: steps of the whole run.
        eval_every: steps between evaluations.
        done: steps that are done.
    """

    steps: int
    eval_every: int
    done: int = 0
    _wall_s: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))
    _evaluation_s: float = 0.0
    _mean: float = 0.0
    _weight: float = 0.0

    def step(self, line: Mapping[str, Any]) -> None:
        """Take in a step line of metrics.jsonl."""
        self.done = int(line["step"])
        self._wall_s.append(line["wall_ms"] / 1e3)
        self._mean = SMOOTHING * self._mean + (1 - SMOOTHING) * line["train_loss"]
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """Take in an evaluation line of metrics.jsonl."""
        self._evaluation_s = line["wall_ms"] / 1e3

    @property
    def smoothed_loss(self) -> float | None:
        """Exponential moving average of the training loss, without the pull of its start."""
        return self._mean / self._weight if self._weight else None

    @property
    def left_s(self) -> float | None:
        """Seconds that the steps and evaluations to come will take at the pace of the last ones."""
        if not self._wall_s:
            return None
        step_s = sum(self._wall_s) / len(self._wall_s)
        evaluations = -(-self.steps // self.eval_every) - self.done // self.eval_every
        return (self.steps - self.done) * step_s + evaluations * self._evaluation_s


class Display:
    """Shows nothing: what every rank but 0 has, and the base of the others.

    An instance is called with a sentence, as ``print`` is.
    """

    width = 118
    """Columns a table may take; what a log is read in, where there is no terminal to ask."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def __call__(self, line: str) -> None:
        """Show one sentence."""

    def warn(self, text: str) -> None:
        """Show a warning, once however often it comes."""
        if text not in self._warned:
            self._warned.add(text)
            self._warning(f"warning: {text}")

    def _warning(self, line: str) -> None:
        self(line)

    def measured(self, line: Mapping[str, Any]) -> None:
        """Show a line of metrics.jsonl that was just written."""

    def evaluating(self, done: int, of: int) -> None:
        """Show how far an evaluation is, in batches."""

    def working(self, what: str, done: int, of: int) -> None:
        """Show how far a long piece of work is, such as loading the weights; may come from any thread."""

    @contextmanager
    def training(self, pace: Pace) -> Iterator[None]:
        """The block in which steps are made."""
        del pace
        yield

    def close(self) -> None:
        """Show nothing live any more; sentences are still taken."""


class PlainDisplay(Display):
    """One line of text for each thing, as a log keeps it."""

    def __init__(self, stream: TextIO, *, prefix: str = "") -> None:
        super().__init__()
        self._stream, self._prefix = stream, prefix
        self._pace: Pace | None = None
        self._told: dict[str, float] = {}

    def __call__(self, line: str) -> None:
        """Write one line."""
        print(self._prefix + line, file=self._stream, flush=True)

    def measured(self, line: Mapping[str, Any]) -> None:
        """Write a line for a step and for an evaluation; other kinds have their own sentences."""
        if line["kind"] == "step" and self._pace is not None:
            self._pace.step(line)
            self(step_text(line, self._pace))
        elif line["kind"] == "evaluation":
            if self._pace is not None:
                self._pace.evaluation(line)
            self(evaluation_text(line))
        elif line["kind"] == "answers":
            for said in answer_texts(line):
                self(said)

    def evaluating(self, done: int, of: int) -> None:
        """Write how far a long evaluation is."""
        self(f"  evaluating: {done} of {of} batches")

    def working(self, what: str, done: int, of: int) -> None:
        """Write how far the work is once it has taken a second, then every five."""
        now = monotonic()
        due = self._told.setdefault(what, now + _FIRST_WORD_S)
        if now >= due:
            self._told[what] = now + _WORDS_APART_S
            self(f"  {what}: {100 * done // max(of, 1)} %")

    @contextmanager
    def training(self, pace: Pace) -> Iterator[None]:
        """Count the steps of the block."""
        self._pace = pace
        yield


class QuietDisplay(Display):
    """Warnings, and what is said after training: the verdict."""

    def __init__(self, stream: TextIO, *, prefix: str = "") -> None:
        super().__init__()
        self._stream, self._prefix, self._silent = stream, prefix, True

    def __call__(self, line: str) -> None:
        """Write a line of the verdict; before it, nothing."""
        if not self._silent:
            self._warning(line)

    def _warning(self, line: str) -> None:
        print(self._prefix + line, file=self._stream, flush=True)

    def close(self) -> None:
        """Let the verdict through."""
        self._silent = False


def step_text(line: Mapping[str, Any], pace: Pace) -> str:
    """A step line of metrics.jsonl in words."""
    figures = figures_of(line, pace)
    return (
        f"step {line['step']:>6}/{pace.steps}  loss {figures['loss']}  grad_norm {figures['grad norm']}"
        f"  lr {figures['lr']}  {figures['tokens/s']} tokens/s  MFU {figures['MFU']}"
        f"  memory {figures['memory']}  data wait {figures['data wait']}  gpu {figures['GPU']}"
        f"  left {figures['left']}"
    )


def evaluation_text(line: Mapping[str, Any]) -> str:
    """An evaluation line of metrics.jsonl in words."""
    said = f"validation loss {_loss_text(line['val_loss'])} over {line['tokens']:,} tokens"
    further = [f"{name} {_loss_text(loss)}" for name, loss in line.get("val_losses", {}).items()]
    return "  ".join((f"step {line['step']:>6}", said, *further))


def answer_texts(line: Mapping[str, Any]) -> Iterator[str]:
    """An answers line of metrics.jsonl in words, a sentence a prompt."""
    for one in line["answers"]:
        prompt, answer = (" ".join(one[key].split()) for key in ("prompt", "answer"))
        ended = "" if one["ended"] else " ..."
        yield f"step {line['step']:>6}  {_cut(prompt)!r}  ->  {_cut(answer)!r}{ended}"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_SAID else text[: _LONGEST_SAID - 3] + "..."


def _loss_text(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def figures_of(line: Mapping[str, Any], pace: Pace) -> dict[str, str]:
    """The figures of a step line as text, by the words they are shown under."""
    smoothed, wall_ms = pace.smoothed_loss, line["wall_ms"]
    return {
        "loss": f"{line['train_loss']:.4f}",
        "smoothed": NOT_AVAILABLE if smoothed is None else f"{smoothed:.4f}",
        "lr": f"{line['lr']:.2e}",
        "grad norm": f"{line['grad_norm']:.3f}",
        "tokens/s": f"{line['tokens_per_sec']:,.0f}",
        "MFU": _shown(line.get("mfu"), lambda share: f"{100 * share:.1f} %"),
        "memory": _shown(line.get("memory_bytes"), lambda size: f"{size / 1e9:,.2f} GB"),
        "data wait": f"{100 * line['data_wait_ms'] / wall_ms:.1f} %" if wall_ms else NOT_AVAILABLE,
        "GPU": f"{line['gpu_util_pct']:.0f} %",
        "left": duration(pace.left_s),
    }


def _shown(value: float | None, text: Callable[[float], str]) -> str:
    return NOT_AVAILABLE if value is None else text(value)


def duration(seconds: float | None) -> str:
    """Seconds as ``h:mm:ss``."""
    if seconds is None:
        return NOT_AVAILABLE
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


@contextmanager
def hear_libraries(display: Display) -> Iterator[None]:
    """While entered, warnings and log records of other libraries come through the display, once each."""
    handler = _Records(display)
    with warnings.catch_warnings():
        # Replaced inside a block that puts it back, so that nothing of it outlives a run.
        warnings.showwarning = lambda message, _, filename, *__, **___: display.warn(
            _in_words(_library(filename), str(message))
        )
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)


class _Records(logging.Handler):
    def __init__(self, display: Display) -> None:
        super().__init__(level=logging.WARNING)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        """Hand one record on as a warning in words."""
        self._display.warn(_in_words(record.name.split(".")[0], record.getMessage()))


def _library(filename: str) -> str:
    parts = Path(filename).parts
    packages = [index for index, part in enumerate(parts) if part in ("site-packages", "dist-packages")]
    return Path(parts[packages[-1] + 1]).stem if packages else Path(filename).stem


def _in_words(library: str, message: str) -> str:
    text = " ".join(message.split())
    short = text if len(text) <= _LONGEST_WARNING else text[:_LONGEST_WARNING].rsplit(" ", 1)[0] + " ..."
    return f"{library} says: {short}"
