"""Which run a step folder belongs to: one identity, and the runs it was branched from.

The identity is derived from what determines the weights (configuration, data, init, and the step a branch
left its parent at), so that equal runs write equal files.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Self

from apr_dist.atomic_files import write_atomically
from apr_dist.parsing import parse_json
from apr_dist.runs.folder import RunFolder


@dataclass(frozen=True)
class History:
    """The identity of a run and its ancestors.

    Attributes:
        run: identity under which steps are saved now.
        parents: (identity, last step) of each run that this one continues.
    """

    run: str
    parents: tuple[tuple[str, int], ...] = ()

    def owns(self, run: str, step: int) -> bool:
        """Whether a step saved by ``run`` is part of this history; a folder without identity is."""
        return run in ("", self.run) or any(run == one and step <= last for one, last in self.parents)

    def branch(self, step: int, *facts: object) -> Self:
        """The history of a run that leaves this one after ``step`` under other settings."""
        parents = tuple((run, min(last, step)) for run, last in (*self.parents, (self.run, step)))
        return type(self)(identity(self.run, step, *facts), parents)

    def write(self, run: RunFolder) -> None:
        """Record the history in the run folder.

        Raises:
            OutputError: it cannot be written.
        """
        write_atomically(run.history, (json.dumps(asdict(self), indent=2) + "\n").encode())

    @classmethod
    def read(cls, run: RunFolder) -> Self | None:
        """The history recorded in a run folder; None if there is none that can be read."""
        try:
            found: dict[str, Any] = parse_json(run.history.read_text(encoding="utf-8"))
            return cls(str(found["run"]), tuple((str(one), int(last)) for one, last in found["parents"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None


def identity(*facts: object) -> str:
    """32 hexadecimal digits that stand for the facts."""
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:32]
