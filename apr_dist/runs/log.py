"""What a run says, kept: ``train.log``, plain text whatever a person sees meanwhile.

The log ends with how the run ended, an error included, so that a finished run can be judged by it.
Figures are not taken from here; they are in ``metrics.jsonl``.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apr_dist.errors import OutputError
from apr_dist.runs.display import Display, Pace, PlainDisplay


class RunLog(Display):
    """Shows everything on another display, and keeps it as text once there is a run folder.

    Args:
        shown: what a person sees.
        prefix: put before every line that is kept.
    """

    def __init__(self, shown: Display, *, prefix: str = "") -> None:
        super().__init__()
        self.width = shown.width
        self._shown, self._text = shown, io.StringIO()
        self._plain = PlainDisplay(self._text, prefix=prefix)
        self._path: Path | None = None

    def keep_in(self, path: Path, *, append: bool) -> None:
        """From now on keep lines in ``path``, those already said first; a resumed run appends.

        Raises:
            OutputError: it cannot be written.
        """
        if not append:
            path.unlink(missing_ok=True)
        self._path = path
        self._write()

    def keep_error(self, error: BaseException) -> None:
        """Keep what stopped the run, where that is possible; it is printed by the entry point."""
        with contextlib.suppress(OutputError):
            self._keep(lambda: self._plain(f"error: {type(error).__name__}: {' '.join(str(error).split())}"))

    def __call__(self, line: str) -> None:
        """Show and keep one sentence."""
        self._shown(line)
        self._keep(lambda: self._plain(line))

    def warn(self, text: str) -> None:
        """Show and keep a warning, once however often it comes."""
        self._shown.warn(text)
        self._keep(lambda: self._plain.warn(text))

    def measured(self, line: Mapping[str, Any]) -> None:
        """Show and keep a line of metrics.jsonl in words."""
        self._shown.measured(line)
        self._keep(lambda: self._plain.measured(line))

    def evaluating(self, done: int, of: int) -> None:
        """Show how far an evaluation is; that is not worth keeping."""
        self._shown.evaluating(done, of)

    def working(self, what: str, done: int, of: int) -> None:
        """Show how far a long piece of work is; that is not worth keeping."""
        self._shown.working(what, done, of)

    @contextmanager
    def training(self, pace: Pace) -> Iterator[None]:
        """The block in which steps are made."""
        own = Pace(steps=pace.steps, eval_every=pace.eval_every, done=pace.done)
        with self._shown.training(pace), self._plain.training(own):
            yield

    def close(self) -> None:
        """Show nothing live any more."""
        self._shown.close()

    def _keep(self, say: Callable[[], None]) -> None:
        say()
        if self._path is not None:
            self._write()

    def _write(self) -> None:
        assert self._path is not None
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(self._text.getvalue())
        except OSError as error:
            raise OutputError(
                f"a line cannot be written ({error.strerror})",
                where=self._path,
                remedy="free space on that disk, then go on with --resume auto",
            ) from error
        self._text.seek(0)
        self._text.truncate()
