"""A finished run as its folder shows it, read strictly: every file, and where two of them disagree.

Each figure of a verdict is somewhere else too: losses in the metrics, digests in the checkpoint, settings in
the configuration. A verdict that was edited, or files of another run beside it, contradict each other.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apr_dist.apr.digests import file_weights_digest
from apr_dist.apr.reader import AprReader
from apr_dist.choices import FinalCheckpoint
from apr_dist.config import TrainConfig
from apr_dist.config.reading import read_tree
from apr_dist.config.schema import digests_of_saved
from apr_dist.config.text import load_config
from apr_dist.errors import ModelFileError
from apr_dist.gates.losses import Agreement, evaluation_gates, final_gates, step_zero_gates
from apr_dist.gates.result import GateResult
from apr_dist.report.run_folder import no_run, read_object, read_text
from apr_dist.runs.folder import RunFolder
from apr_dist.runs.verdict import Status

_LAST_LINE = re.compile(r"\(exit code (\d+)\)$")
_SHARED = (
    *("init_digest", "data_fingerprint", "val_data_fingerprint", "tokenizer_sha256", "config_digest"),
    *("code_digest", "tool_version", "seed"),
)
"""Facts of the verdict that the checkpoint carries too, as ``apr_dist.*``."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What the checkpoint says of itself, and what was computed from it."""

    size_bytes: int
    tensors: int
    vocab_size: int
    said: Mapping[str, Any]
    digest: str
    weights_digest: str


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """Everything a run left.

    Attributes:
        folder: the run folder.
        config: the resolved configuration it trained with.
        verdict: verdict.json.
        config_digests: what config.yaml was identified by, in this version or an earlier one.
        lines: every line of metrics.jsonl.
        log: train.log; empty where it is missing.
        checkpoint: None where it does not open.
        refusal: why the checkpoint does not open.
    """

    folder: Path
    config: TrainConfig
    verdict: Mapping[str, Any]
    config_digests: Collection[str]
    lines: Sequence[Mapping[str, Any]]
    log: str
    checkpoint: Checkpoint | None
    refusal: str | None

    def kind(self, name: str) -> list[Mapping[str, Any]]:
        """The metrics lines of one kind, in order."""
        return [line for line in self.lines if line.get("kind") == name]

    @property
    def facts(self) -> Mapping[str, Any]:
        """The facts of its verdict."""
        found: Mapping[str, Any] = self.verdict["facts"]
        return found

    @property
    def compared(self) -> list[Mapping[str, Any]]:
        """The evaluations on the present held-out data: a run that changed them counts from 0 again."""
        lines = self.kind("evaluation")
        first = max(
            (at for at, line in enumerate(lines) if line.get("evaluation", line.get("epoch")) == 0), default=0
        )
        return lines[first:]

    @property
    def val_losses(self) -> list[float]:
        """Every validation loss, the one of step 0 first; NaN where it was not finite."""
        losses = [line.get("val_loss") for line in self.compared]
        return [math.nan if loss is None else float(loss) for loss in losses]

    @property
    def handed_over(self) -> int:
        """The step that checkpoint.apr is of: the last one, or the best."""
        best = self.config.checkpoint.final is FinalCheckpoint.BEST
        return int(self.facts.get("checkpoint_step" if best else "steps") or 0)

    @property
    def handed_over_loss(self) -> float | None:
        """The validation loss that metrics.jsonl has for that step."""
        found = [line["val_loss"] for line in self.kind("evaluation") if line["step"] == self.handed_over]
        return found[-1] if found else None

    @property
    def train_losses(self) -> dict[int, float]:
        """Training loss by step."""
        return {line["step"]: line["train_loss"] for line in self.kind("step")}

    @property
    def agreements(self) -> list[Agreement]:
        """Every comparison of training and evaluation."""
        keys = ("step", "train_loss", "eval_loss")
        return [Agreement(**{key: line[key] for key in keys}) for line in self.kind("agreement")]

    @property
    def logged_exit_code(self) -> int | None:
        """The exit code that the log ends with, or None where it does not end with one."""
        lines = self.log.rstrip().splitlines()
        found = _LAST_LINE.search(lines[-1]) if lines else None
        return int(found[1]) if found else None


def read_finished_run(folder: Path) -> FinishedRun:
    """Read the folder of a run that came to a verdict.

    Raises:
        UsageError: a file is missing, malformed, or of a run without evaluations.
    """
    files = RunFolder(folder)
    verdict, metrics = read_object(files.verdict, read_text(files.verdict)), files.metrics
    lines = [read_object(metrics, line) for line in read_text(metrics).splitlines()]
    if not isinstance(verdict.get("facts"), dict) or not isinstance(verdict.get("gates"), list):
        raise no_run(files.verdict, "it has no gates and facts")
    log = files.log
    checkpoint, refusal = _checkpoint(files.checkpoint)
    run = FinishedRun(
        folder=folder,
        config=load_config(folder),
        verdict=verdict,
        config_digests=digests_of_saved(read_tree(files.config)),
        lines=lines,
        log=log.read_text(encoding="utf-8", errors="replace") if log.is_file() else "",
        checkpoint=checkpoint,
        refusal=refusal,
    )
    if not run.val_losses:
        raise no_run(metrics, "it has no evaluation")
    return run


def contradictions(run: FinishedRun) -> list[str]:
    """Where the files of a run disagree, one clause each; none for a run nobody touched."""
    found = list(_about_the_end(run))
    if run.verdict.get("status") != Status.ABORTED:  # which measured nothing further
        found += [*_about_figures(run), *_about_the_checkpoint(run), *_about_gates(run)]
    return found


def _about_the_end(run: FinishedRun) -> Iterator[str]:
    gates = run.verdict["gates"]
    failed = any(gate.get("ship_blocking") and not gate.get("passed") for gate in gates)
    aborted = run.verdict.get("status") == Status.ABORTED
    if (run.verdict.get("exit_code") == 0) == (failed or aborted):
        yield f"verdict.json says exit code {run.verdict.get('exit_code')} and its gates another"
    if not aborted and run.logged_exit_code != run.verdict.get("exit_code"):
        yield f"verdict.json says exit code {run.verdict.get('exit_code')}, the log {run.logged_exit_code}"
    if bool(run.verdict.get("synthetic")) != run.config.synthetic:
        yield "verdict.json and config.yaml disagree on synthetic"
    if run.facts.get("config_digest") not in run.config_digests:
        yield "config.yaml is not the configuration of verdict.json"


def _about_figures(run: FinishedRun) -> Iterator[str]:
    steps = [line["step"] for line in run.kind("step")]
    if steps != list(range(1, len(steps) + 1)) or run.facts.get("steps") != len(steps):
        yield f"verdict.json says {run.facts.get('steps')} steps and metrics.jsonl has {len(steps)} lines"
    said = run.facts.get("val_losses")
    if said != [line.get("val_loss") for line in run.compared]:
        yield "the validation losses of verdict.json are not those of metrics.jsonl"
    last = run.train_losses.get(len(steps))
    if run.facts.get("train_loss") != last:
        yield f"verdict.json says training loss {run.facts.get('train_loss')} and metrics.jsonl {last}"
    tokens = len(steps) * run.config.batch_size * run.config.seq_length
    if run.facts.get("tokens_seen") != tokens:
        yield f"verdict.json says {run.facts.get('tokens_seen')} tokens and the steps hold {tokens}"
    if run.kind("evaluation")[-1]["step"] != len(steps):
        yield "the last evaluation is not of the last step"


def _about_the_checkpoint(run: FinishedRun) -> Iterator[str]:
    found = run.checkpoint
    if found is None:
        return
    if found.weights_digest != run.facts.get("weights_digest"):
        yield "checkpoint.apr does not hold the weights that verdict.json speaks of"
    for key in _SHARED:
        if found.said.get(f"apr_dist.{key}") != run.facts.get(key):
            yield f"checkpoint.apr and verdict.json disagree on {key}"
    for key, value in (
        ("step", run.handed_over),
        ("val_loss", run.handed_over_loss),
    ):
        if found.said.get(f"apr_dist.{key}") != value:
            yield f"checkpoint.apr says {key} {found.said.get(f'apr_dist.{key}')} and the run {value}"


def _about_gates(run: FinishedRun) -> Iterator[str]:
    """The gates that follow from losses are worked out again; a flipped one is found."""
    if run.config.synthetic or run.checkpoint is None:
        return
    told = [json.dumps(gate, sort_keys=True) for gate in run.verdict["gates"]]
    for gate in expected_gates(run, vocab_size=run.checkpoint.vocab_size):
        if json.dumps(gate.to_json(), sort_keys=True) not in told:
            yield f"the gate {gate.gate!r} of verdict.json is not what its losses give"


def expected_gates(run: FinishedRun, *, vocab_size: int) -> list[GateResult]:
    """The gates on losses, from metrics alone."""
    losses, train, handed_over = run.val_losses, run.train_losses, run.handed_over_loss
    from_init = run.config.init is not None
    return [
        *step_zero_gates(losses[0], vocab_size=vocab_size, from_init=from_init),
        *evaluation_gates(run.agreements, val_loss=losses[-1], train_loss=train.get(len(train))),
        *final_gates(
            first_val_loss=losses[0],
            val_loss=math.nan if handed_over is None else handed_over,
            target=run.config.target,
            finetune=from_init,
            steps=len(train),
        ),
    ]


def _checkpoint(path: Path) -> tuple[Checkpoint | None, str | None]:
    try:
        with AprReader(path) as reader:
            return Checkpoint(
                size_bytes=reader.size_bytes,
                tensors=len(reader.tensors),
                vocab_size=int(reader.metadata.to_mapping().get("vocab_size") or 0),
                said=dict(reader.metadata.custom),
                digest=reader.digest(),
                weights_digest=file_weights_digest(reader),
            ), None
    except ModelFileError as error:
        return None, error.what
