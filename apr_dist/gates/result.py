"""What a gate measured, what it required, and whether that passed."""

from __future__ import annotations

from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class GateResult:
    """One line of the verdict.

    Attributes:
        id: the falsifier that pins the gate.
        gate: its name in words.
        measured: what was found, as text.
        required: what had to be found, as text.
        passed: whether it was.
        ship_blocking: whether a failure makes the run exit non-zero.
    """

    id: str
    gate: str
    measured: str
    required: str
    passed: bool = True
    _: KW_ONLY
    ship_blocking: bool = True

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return asdict(self)
