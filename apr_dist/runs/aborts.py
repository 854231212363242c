"""What a run that is stopped leaves in verdict.json, whoever hears first: the loop or the watch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apr_dist.atomic_files import write_atomically
from apr_dist.errors import AprDistError, ExitCode, OutputError
from apr_dist.gates.result import GateResult
from apr_dist.parallel.heartbeat import HERE
from apr_dist.parallel.watchdog import Failure
from apr_dist.runs.checkpoint import json_bytes
from apr_dist.runs.verdict import Status, Verdict


class AbortRecord:
    """Writes the verdict of a run that failed, once.

    Args:
        path: verdict.json.
        rank: of this process. Rank 0 writes; another rank only if it is rank 0 that is gone.
        gates: the gates that were passed.
        provenance: digests that identify the run.
        synthetic: whether it trained on made-up tokens.
    """

    def __init__(
        self,
        path: Path,
        *,
        rank: int,
        gates: Sequence[GateResult],
        provenance: dict[str, Any],
        synthetic: bool,
    ) -> None:
        self._path, self._rank, self._gates = path, rank, tuple(gates)
        self._provenance, self._synthetic = provenance, synthetic
        self._lock = threading.Lock()

    def of_error(self, error: BaseException) -> None:
        """Record what this rank raised."""
        code = error.exit_code if isinstance(error, AprDistError) else ExitCode.INTERNAL
        facts: dict[str, Any] = {"failed_step": HERE.step, "failed_phase": HERE.phase.value}
        if isinstance(error, AprDistError):
            facts |= {"falsifier": error.falsifier, **error.facts}
        if self._rank == 0:
            self._write(str(error), code, facts)

    def of_failure(self, failure: Failure) -> None:
        """Record what another rank raised, or that none moves any more."""
        facts = {
            "failed_rank": failure.rank,
            "failed_step": failure.step,
            "failed_phase": failure.phase,
        }
        if self._rank == 0 or failure.rank == 0:
            self._write(failure.text, ExitCode(failure.code), facts)

    def _write(self, detail: str, code: ExitCode, facts: dict[str, Any]) -> None:
        if not self._lock.acquire(blocking=False):
            return
        if self._rank != 0 and self._path.exists():  # rank 0, or another rank that saw it go, was first
            return
        verdict = Verdict(
            status=Status.ABORTED,
            detail=detail,
            gates=self._gates,
            facts={**self._provenance, **facts},
            synthetic=self._synthetic,
            aborted_with=code,
        )
        # The error itself matters more than failing to write it down.
        with contextlib.suppress(OutputError):
            write_atomically(self._path, json_bytes(verdict.to_json()))
