"""Where a run goes on: which step folder, and whether it is this run at all.

A resume that would change the mathematics is refused unless the key is named: a run that goes on under
another schedule, seed or batch is another run, and its losses would say nothing about either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apr_dist.config import TrainConfig, flag_of
from apr_dist.errors import UsageError
from apr_dist.training.step_folders import SavedState, newest_whole, read_state

CHANGED = "FALSIFY-APR-DIST-CHECKPOINT-007"

NEVER, AUTO = "never", "auto"

_FREE = {
    *("run_dir", "overwrite", "resume", "resume_allow", "init", "dataset", "val_dataset", "tokenizer"),
    *("progress", "track", "device", "steps_per_epoch", "micro_batch_size", "target_val_loss"),
    *(
        "parallel.strategy",
        "parallel.shard_size",
        "parallel.offload",
        "parallel.cpu_threads",
        "parallel.timeout_s",
        "parallel.hang_s",
        "loader.verify",
        "loader.max_epochs",
        "loader.access",
        "loader.prefetch_batches",
        "loader.pin_memory",
        "compute.activation_checkpointing",
        "compute.kernels",
    ),
    *("early_stop.patience", "early_stop.min_epochs", "evaluation.micro_batch_size", "log_every"),
    *("checkpoint.keep_last", "checkpoint.keep_every", "checkpoint.background"),
}
"""Keys that change where and how often, not what is computed. Files are compared by content instead; a
mixture's fingerprint holds its weights."""


@dataclass(frozen=True)
class ResumePoint:
    """A whole step folder and what it says."""

    folder: Path
    state: SavedState


def find_resume_point(config: TrainConfig, say: Callable[[str], None]) -> ResumePoint | None:
    """The step folder ``--resume`` means, or None to begin at step 0; says which ones it passes over.

    Raises:
        UsageError: a setting that alters the mathematics differs and is not named.
        DamagedModelFile: the folder that was named is not whole.
    """
    if config.resume == NEVER:
        return None
    if config.resume == AUTO:
        folder = newest_whole(config.run_dir, lambda damaged: say(f"passed over: {damaged}"))
    else:
        folder = Path(config.resume)
    if folder is None:
        return None
    point = ResumePoint(folder=folder, state=read_state(folder))
    refuse_changes(config, point)
    return point


def refuse_changes(config: TrainConfig, point: ResumePoint) -> None:
    """Compare the configuration with the one the run began with.

    Raises:
        UsageError: naming the keys, with both values.
    """
    allowed = {key.strip() for key in config.resume_allow.split(",")}
    # A key that the saved configuration does not know had its default then.
    before = flat(TrainConfig().model_dump(mode="json")) | flat(point.state.config)
    now = flat(config.model_dump(mode="json"))
    changed = [
        f"{key} was {before.get(key)} and is {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and key not in _FREE | allowed
        and not key.startswith("loader.mixture.")
    ]
    if changed:
        key = changed[0].split(" ", 1)[0]
        raise UsageError(
            f"this is not the run that was saved: {'; '.join(changed[:5])}",
            where=point.folder,
            expected="the settings the run began with",
            remedy=f"give them again, or name what may change: {flag_of('resume_allow')} {key}",
            falsifier=CHANGED,
        )


def refuse_other_inputs(point: ResumePoint, provenance: dict[str, Any], *, init_digest: str | None) -> None:
    """The data and the init file of a resumed run are the ones it began with, by content.

    Raises:
        UsageError: naming both digests.
    """
    pairs = [("training shards", point.state.data_fingerprint, provenance.get("data_fingerprint"))]
    if init_digest is not None:
        pairs.append(("init file", point.state.init_digest, init_digest))
    for what, before, now in pairs:
        if before != now:
            raise UsageError(
                f"the {what} were {before} and are {now}",
                where=point.folder,
                expected="what the run began with",
                remedy="give the same files, or start a new run with --init on the checkpoint",
                falsifier=CHANGED,
            )


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested mapping by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
