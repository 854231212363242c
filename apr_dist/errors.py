"""Every error a user can meet: one exception tree, no logic beyond its own text.

An error says what is wrong, where, what was expected and what to do; it knows the falsifier that
pins it and the exit code the process ends with. Entry points print ``str(error)`` as one paragraph
and exit with ``error.exit_code``; nothing else decides exit codes.
"""

from __future__ import annotations

import errno
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar


class ExitCode(IntEnum):
    """What the process ends with; documented in ``docs/exit-codes.md``."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    MODEL_FILE = 3
    GATE = 4
    DATA = 5
    OUTPUT = 6
    DIVERGENCE = 7
    NUMERICAL_INSTABILITY = 8
    DISTRIBUTED = 9
    VERDICT = 10
    INTERRUPTED = 130
    TERMINATED = 143

    @property
    def meaning(self) -> str:
        """What the code tells the one who started the process."""
        return _MEANINGS[self]


_MEANINGS = {
    ExitCode.OK: "done, and every ship-blocking gate passed",
    ExitCode.INTERNAL: "a defect of this project; run again with `--debug` and report it",
    ExitCode.USAGE: "a wrong flag, key or combination",
    ExitCode.MODEL_FILE: "the model file is missing, not APR v2, unsupported, or damaged",
    ExitCode.GATE: "a gate refused: architecture, weights, vocabulary, or the step-0 loss",
    ExitCode.DATA: "shards, manifest, tokenizer or corpus cannot be used",
    ExitCode.OUTPUT: "the output exists, is not writable, is not the same for every rank,"
    " or the disk is full",
    ExitCode.DIVERGENCE: "the validation loss left its band",
    ExitCode.NUMERICAL_INSTABILITY: "a loss or gradient norm is NaN or infinite;"
    " the weights were not touched",
    ExitCode.DISTRIBUTED: "the processes or strategy that run are not the ones asked for, one of them died,"
    " or none moves any more",
    ExitCode.VERDICT: "the run ended, and a ship-blocking gate of its verdict failed",
    ExitCode.INTERRUPTED: "SIGINT (Ctrl-C); of a training the step just finished was saved",
    ExitCode.TERMINATED: "SIGTERM; of a training the step just finished was saved",
}


class AprDistError(Exception):
    """Base of every error of this project.

    Args:
        what: what is wrong, with the value found; a clause without a final full stop.
        where: the file, key or rank it was found in.
        expected: what would have been right.
        remedy: what to do about it, as a command where there is one.
        falsifier: id of the falsifier (see ``contracts/``) that pins this refusal.

    Attributes:
        facts: figures for a run's verdict, by name.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.INTERNAL

    def __init__(
        self,
        what: str,
        *,
        where: str | Path | None = None,
        expected: str | None = None,
        remedy: str | None = None,
        falsifier: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.expected = expected
        self.remedy = remedy
        self.falsifier = falsifier
        self.told_by_rank_0 = False
        self.facts: dict[str, Any] = {}

    def __str__(self) -> str:
        head = f"[{self.falsifier}] " if self.falsifier else ""
        place = f"{self.where}: " if self.where else ""
        parts = [f"{head}{place}{self.what}."]
        if self.expected:
            parts.append(f"Expected {self.expected}.")
        if self.remedy:
            parts.append(f"Fix: {self.remedy}.")
        return " ".join(parts)

    @property
    def page(self) -> str | None:
        """The command that explains the cause and the fix, wherever the program is installed; or None."""
        return None if self.falsifier is None else f"apr-dist explain {self.falsifier}"

    def to_fields(self) -> dict[str, str | None]:
        """The error as plain fields, so that one rank can tell the others (no pickle)."""
        return {
            "kind": type(self).__name__,
            "what": self.what,
            "where": self.where,
            "expected": self.expected,
            "remedy": self.remedy,
            "falsifier": self.falsifier,
        }

    @staticmethod
    def from_fields(fields: dict[str, str | None]) -> AprDistError:
        """Rebuild the error that ``to_fields`` described on rank 0, which prints it for all."""
        kind = _kinds()[fields["kind"] or ""]
        error = kind(
            fields["what"] or "",
            where=fields["where"],
            expected=fields["expected"],
            remedy=fields["remedy"],
            falsifier=fields["falsifier"],
        )
        error.told_by_rank_0 = True
        return error


class UsageError(AprDistError):
    """A wrong flag, key or combination of them."""

    exit_code = ExitCode.USAGE


class ModelFileError(AprDistError):
    """A model file that cannot be used as it is."""

    exit_code = ExitCode.MODEL_FILE


class ModelFileMissing(ModelFileError):
    """No regular, readable file at that path."""


class NotAModelFile(ModelFileError):
    """The file is empty or its magic is another format's."""


class UnsupportedModelFile(ModelFileError):
    """A real model file that uses something this reader does not support, named in the text."""


class DamagedModelFile(ModelFileError):
    """Truncated, altered, or inconsistent with itself."""


class GateRefused(AprDistError):
    """A gate between the files and the first step said no."""

    exit_code = ExitCode.GATE


class ArchitectureRefused(GateRefused):
    """The file's architecture is missing, not a decoder, or contradicts its tensors."""


class DimensionsUnstated(ArchitectureRefused):
    """The file does not state every dimension of its model; ``apr-dist stamp`` can."""


class WeightsRefused(GateRefused):
    """A tensor is missing, left over, of another shape, or not finite."""


class VocabularyRefused(GateRefused):
    """Tokenizer, shards and model do not share a vocabulary."""


class LossRefused(GateRefused):
    """A measured loss is impossible for the model it is said to come from."""


class DataError(AprDistError):
    """Shards, manifest, tokenizer or corpus that cannot be used as they are."""

    exit_code = ExitCode.DATA


class ManifestError(DataError):
    """manifest.json is missing, malformed, or contradicts the folder."""


class ShardError(DataError):
    """A shard is missing, truncated, replaced, or holds other tokens than recorded."""


class TokenizerError(DataError):
    """A tokenizer that is missing, malformed or of a kind that is not supported."""


class CorpusError(DataError):
    """A source document or corpus folder that cannot be read."""


class StreamExhausted(DataError):
    """The run asked for more epochs of data than it allowed itself."""


class OutputError(AprDistError):
    """The output cannot be written: it exists, is read-only, or the disk is full."""

    exit_code = ExitCode.OUTPUT


class Divergence(AprDistError):
    """The validation loss left the allowed band (GATE-TRAIN-005)."""

    exit_code = ExitCode.DIVERGENCE


class NumericalInstability(AprDistError):
    """A loss or gradient norm is NaN or infinite (GATE-TRAIN-007)."""

    exit_code = ExitCode.NUMERICAL_INSTABILITY


class DistributedError(AprDistError):
    """The processes that run are not the ones that were asked for."""

    exit_code = ExitCode.DISTRIBUTED


class Interrupted(AprDistError):
    """SIGINT reached the run; the step just finished was saved."""

    exit_code = ExitCode.INTERRUPTED


class Terminated(AprDistError):
    """SIGTERM reached the run; the step just finished was saved."""

    exit_code = ExitCode.TERMINATED


class VerdictFailed(AprDistError):
    """The run finished and a ship-blocking gate of its verdict failed."""

    exit_code = ExitCode.VERDICT


def as_known(error: BaseException) -> AprDistError:
    """What an entry point says of any error: itself where it is ours, a defect where nobody foresaw it."""
    if isinstance(error, AprDistError):
        return error
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return UsageError(
            "the file system takes no name as long as that",
            where=str(error.filename)[:100],
            expected="a path that can exist",
            remedy="choose a shorter name",
        )
    text = " ".join(str(error).split())[:2000]
    return AprDistError(
        f"internal error: {type(error).__name__}: {text}",
        remedy="run again with --debug for the traceback, and report it",
    )


def _kinds() -> dict[str, type[AprDistError]]:
    kinds: dict[str, type[AprDistError]] = {}
    pending: list[type[AprDistError]] = [AprDistError]
    while pending:
        kind = pending.pop()
        kinds[kind.__name__] = kind
        pending.extend(kind.__subclasses__())
    return kinds
