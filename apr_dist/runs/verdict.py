"""The verdict of a run: every gate, what was measured, what was required, pass or fail."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from apr_dist.errors import ExitCode
from apr_dist.gates.result import GateResult


class Status(StrEnum):
    """How a run ended."""

    OK = "OK"
    COMPLETED = "COMPLETED"
    EARLY_STOP = "EARLY_STOP"
    ABORTED = "ABORTED"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Everything ``verdict.json`` says.

    Attributes:
        status: how the run ended.
        detail: one sentence on why.
        gates: every gate that was evaluated, in order.
        facts: digests and figures that identify the run.
        synthetic: whether it trained on made-up tokens.
    """

    status: Status
    detail: str
    gates: tuple[GateResult, ...]
    facts: dict[str, Any]
    synthetic: bool = False

    @property
    def failed(self) -> tuple[GateResult, ...]:
        """The ship-blocking gates that failed."""
        return tuple(gate for gate in self.gates if gate.ship_blocking and not gate.passed)

    @property
    def exit_code(self) -> ExitCode:
        """OK only when the run ended by itself and every ship-blocking gate passed."""
        good = self.status is not Status.ABORTED and not self.failed
        return ExitCode.OK if good else ExitCode.VERDICT

    def to_json(self) -> dict[str, Any]:
        """The verdict as plain JSON values."""
        return {
            "status": self.status.value,
            "detail": self.detail,
            "exit_code": int(self.exit_code),
            "synthetic": self.synthetic,
            "gates": [gate.to_json() for gate in self.gates],
            "facts": self.facts,
        }
