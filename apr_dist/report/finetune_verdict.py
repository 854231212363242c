"""The finetune contract asked of a finished run: its gates, the signed verdict, and evidence to keep.

Nothing is believed that can be worked out again from the files (``finished_run``). What the bounds are is in
``runs.verdict``; what a kept verdict must be is in ``contracts.evidence``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from apr_dist.atomic_files import file_digest, write_atomically
from apr_dist.config.reading import read_tree
from apr_dist.contracts.evidence import read_verdict, sign
from apr_dist.errors import OutputError, UsageError
from apr_dist.gates.losses import PLAUSIBLE_SHARE, random_start_gates
from apr_dist.gates.result import GateResult
from apr_dist.report.finished_run import FinishedRun, contradictions, expected_gates, read_finished_run
from apr_dist.runs.checkpoint import json_bytes
from apr_dist.runs.folder import RunFolder
from apr_dist.runs.verdict import Status, Verdict

CONTRACT = "apr-pretrain-init-finetune-v1"
CONTRACT_STEPS = 500
"""Steps of a run that can discharge the contract."""

MAX_WALL_S, WALL_TOKENS = 3600.0, 4096
"""FINETUNE-002: seconds for the steps of the contract, at this many tokens a step."""

_FINETUNE = "FALSIFY-APR-PRETRAIN-INIT-FINETUNE-"
_AGREES = "FALSIFY-APR-DIST-TRAINER-036"
_RESOURCE_WORDS = (
    *("out of memory", "memoryerror", "cannot allocate memory", "can't allocate memory", "cuda error"),
    *("too many open files", "no space left on device", "can't start new thread"),
    "resource temporarily unavailable",
)
_RESOURCE_ERRORS = re.compile("|".join(_RESOURCE_WORDS), re.IGNORECASE)
_SIGNED_FACTS = (
    *("init_digest", "data_fingerprint", "val_data_fingerprint", "tokenizer_sha256", "config_digest"),
    *("code_digest", "tool_version", "weights_digest"),
)
_KEPT_FACTS = ("steps", "tokens_seen", "train_loss", "wall_seconds", "strategy", "world_size", "device")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A run after judgement: the verdict to print, and the one to keep, signed."""

    run: FinishedRun
    verdict: Verdict
    body: Mapping[str, Any]


def judge(folder: Path, *, steps: int | None = CONTRACT_STEPS) -> Judged:
    """Evaluate every gate of the contract, or of the run itself, on the run in ``folder``.

    Args:
        folder: a finished run's folder.
        steps: how many the run must have; fewer than the contract's make it a rehearsal, which
            discharges nothing. None: the run's own gates, whatever its steps and start; a rehearsal too.

    Raises:
        UsageError: it is no finished run, or one that did not start from a file.
    """
    run = read_finished_run(folder)
    if steps is not None and run.config.init is None:
        raise UsageError(
            "the run did not start from a file",
            where=folder,
            expected=f"a run with --init, of which {CONTRACT} speaks",
            remedy="leave --steps out: the run is then judged by its own gates",
        )
    gates = (
        *_end_gates(run, steps),
        _checkpoint_gate(run),
        *_loss_gates(run),
        _log_gate(run),
        _agreement_gate(run),
    )
    judge_of_it = "its own gates" if steps is None else CONTRACT
    aborted = run.verdict.get("status") == Status.ABORTED
    verdict = Verdict(
        status=Status.ABORTED if aborted else Status.COMPLETED,
        detail=f"{run.facts.get('steps', 0)} steps judged by {judge_of_it}",
        gates=gates,
        facts={key: run.facts.get(key) for key in _KEPT_FACTS},
        synthetic=run.config.synthetic,
    )
    body = {
        **verdict.to_json(),
        "contract": CONTRACT,
        "rehearsal": steps is None or steps < CONTRACT_STEPS,
        "run_gates": _run_gates(run),
        "signed": _digests(run),
    }
    return Judged(run=run, verdict=verdict, body=body)


def keep_evidence(judged: Judged, folder: Path, *, force: bool) -> list[Path]:
    """Write what may be kept of a run: metrics, configuration, pictures, and the signed verdict last.

    No weights, no log, and no path of the machine it ran on.

    Returns:
        every file written.

    Raises:
        OutputError: the folder holds files and ``force`` is not given, or it cannot be written.
    """
    _make_room(folder, force=force)
    run, files, verdict = judged.run, RunFolder(judged.run.folder), RunFolder(folder).verdict
    names = {key: value.name for key, value in run.config if isinstance(value, Path)}
    # As the run wrote it: its digest covers the names that keys had then.
    config = {**read_tree(files.config), **names, "resume": "never"}
    contents = {
        files.metrics.name: files.metrics.read_bytes(),
        files.config.name: yaml.safe_dump(config, sort_keys=False).encode(),
        **{path.name: path.read_bytes() for path in sorted(run.folder.glob("report-*.png"))},
    }
    for name, content in contents.items():
        write_atomically(folder / name, content)
    digests = {name: file_digest(folder / name) for name in contents}
    write_atomically(verdict, json_bytes(sign({**judged.body, "files": digests})))
    return [*(folder / name for name in contents), verdict]


def _end_gates(run: FinishedRun, steps: int | None) -> list[GateResult]:
    done, wall = len(run.train_losses), float(run.facts.get("wall_seconds") or math.inf)
    tokens = run.config.batch_size * run.config.seq_length
    code = run.verdict.get("exit_code")
    said = f"{run.verdict.get('status')}, exit code {code}, log {run.logged_exit_code}"
    well = code == 0 and run.logged_exit_code == 0 and run.verdict.get("status") != Status.ABORTED
    ended = GateResult(_FINETUNE + "001", "the run ended well", said, "exit code 0 in verdict and log", well)
    if steps is None:
        return [ended]
    took = f"{wall:,.0f} s for {done} steps of {tokens:,} tokens on {run.facts.get('device')}"
    limit = f"{MAX_WALL_S:,.0f} s: {CONTRACT_STEPS} steps of {WALL_TOKENS:,} tokens on an RTX 4090"
    fast = wall <= MAX_WALL_S and done >= CONTRACT_STEPS and tokens >= WALL_TOKENS
    return [
        ended,
        GateResult(_FINETUNE + "005", "steps of the run", str(done), f"at least {steps}", done >= steps),
        GateResult(_FINETUNE + "002", "wall time", took, limit, fast, ship_blocking=False),
    ]


def _checkpoint_gate(run: FinishedRun) -> GateResult:
    found = run.checkpoint
    measured = run.refusal or "nothing"
    if found is not None:
        measured = f"APR v2, {found.size_bytes / 1e6:,.1f} MB, {found.tensors} tensors, checksums match"
    required = "right magic, every checksum right"
    return GateResult(_FINETUNE + "004", "checkpoint opens", measured, required, found is not None)


def _loss_gates(run: FinishedRun) -> list[GateResult]:
    if run.checkpoint is None:
        return []
    vocab_size = run.checkpoint.vocab_size
    gates = [*expected_gates(run, vocab_size=vocab_size)]
    if run.config.init is not None:
        gates += _random_gates(run, vocab_size)
    if not run.agreements:
        gates.append(
            _missing("007", "evaluation agrees with training", "compared at the first and last step")
        )
    return [*gates, _plausible_throughout(run)]


def _random_gates(run: FinishedRun, vocab_size: int) -> list[GateResult]:
    measured = run.kind("random-weights")
    if len(measured) != 1:
        return [_missing("003", "step-0 loss against random weights", "measured once in the same run")]
    keys = ("random_loss", "init_loss", "tokens")
    return random_start_gates(**{key: measured[0][key] for key in keys}, vocab_size=vocab_size)


def _missing(number: str, gate: str, required: str) -> GateResult:
    return GateResult(_FINETUNE + number, gate, "not measured", required, passed=False)


def _plausible_throughout(run: FinishedRun) -> GateResult:
    train = run.train_losses
    later = [line for line in run.kind("evaluation") if line["step"] in train]
    shares = [(line["val_loss"] or math.nan) / train[line["step"]] for line in later]
    measured = f"{min(shares):.3f} of the training loss at the lowest" if shares else "not measured"
    passed = bool(shares) and all(share >= PLAUSIBLE_SHARE for share in shares)
    gate = "every validation loss is plausible"
    return GateResult(_FINETUNE + "007", gate, measured, f"at least {PLAUSIBLE_SHARE}", passed)


def _log_gate(run: FinishedRun) -> GateResult:
    errors = [line for line in run.log.splitlines() if _RESOURCE_ERRORS.search(line)]
    said = errors[0][:120] if errors else f"none in {len(run.log.splitlines())} lines"
    said = said if run.log else "there is no log"
    gate, required = "no resource error in the log", "no lack of memory, files, threads or disk"
    passed = bool(run.log) and not errors
    return GateResult(_FINETUNE + "006", gate, said, required, passed, ship_blocking=False)


def _agreement_gate(run: FinishedRun) -> GateResult:
    found = contradictions(run)
    said = "; ".join(found[:3]) or "verdict, metrics, configuration, log and checkpoint agree"
    return GateResult(_AGREES, "what the run left agrees with itself", said, "no contradiction", not found)


def _run_gates(run: FinishedRun) -> list[dict[str, Any]]:
    """The run's own gates, without paths."""
    named = run.config
    paths = [named.init, named.dataset, *named.held_out.values(), named.tokenizer, run.folder]
    gates = []
    for gate in run.verdict["gates"]:
        measured = str(gate.get("measured"))
        for path in paths:
            measured = measured.replace(str(path), path.name) if path is not None else measured
        gates.append({**gate, "measured": measured})
    return gates


def _digests(run: FinishedRun) -> dict[str, Any]:
    facts = {key: run.facts.get(key) for key in _SIGNED_FACTS}
    left = RunFolder(run.folder)
    named = {
        "metrics": left.metrics,
        "run_verdict": left.verdict,
        "config_file": left.config,
        "log": left.log,
    }
    files = {f"{key}_sha256": file_digest(path) for key, path in named.items() if path.is_file()}
    return {**facts, **files, "checkpoint_digest": run.checkpoint.digest if run.checkpoint else None}


def _make_room(folder: Path, *, force: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        standing = {path.name for path in folder.iterdir()}
        verdict = RunFolder(folder).verdict
        earlier = read_verdict(verdict)
        if standing and not force:
            raise OutputError(
                "already holds files",
                where=folder,
                expected="a new or empty folder",
                remedy="choose another folder, or pass --force to replace the evidence in it",
            )
        named = {verdict.name, *earlier.get("files", ())} if isinstance(earlier, dict) else set()
        for name in standing & named:
            (folder / name).unlink()
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", where=folder) from error
