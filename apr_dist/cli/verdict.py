"""The verb that judges a finished run by its own gates or the finetune contract."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from apr_dist.atomic_files import write_atomically
from apr_dist.contracts.evidence import sign
from apr_dist.errors import ExitCode
from apr_dist.report.finetune_verdict import judge, keep_evidence
from apr_dist.report.verdict_table import verdict_lines
from apr_dist.runs.checkpoint import json_bytes

OUTPUT_NAME = "finetune-verdict.json"


def verdict(
    run_dir: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    steps: int | None = None,
    evidence: Path | None = None,
    force: bool = False,
) -> int:
    """Judge a finished run by its own gates or the finetune contract, and sign the verdict.

    Example: apr-dist verdict runs/first --steps 500 --evidence contracts/evidence/first

    Args:
        run_dir: the run folder.
        output: signed verdict to write; by default finetune-verdict.json in the run folder.
        steps: judge by the finetune contract, which asks for 500; fewer make it a rehearsal, which discharges
            nothing. By default a run is judged by its own gates, and the contract is not discharged.
        evidence: also keep metrics, configuration, pictures and verdict of a run that passed in this folder.
        force: replace earlier evidence in that folder.
    """
    judged = judge(run_dir, steps=steps)
    write_atomically(output or run_dir / OUTPUT_NAME, json_bytes(sign(judged.body)))
    for line in verdict_lines(judged.verdict):
        print(line)
    if evidence is not None and judged.verdict.exit_code is ExitCode.OK:
        for path in keep_evidence(judged, evidence, force=force):
            print(path)
    return int(judged.verdict.exit_code)
