"""Where a run resumes: which step folder, and whether it is the same run.

A resume that would change the mathematics is refused unless the key is named: a run that continues under
another schedule, seed or batch is another run, and its losses would say nothing about either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from apr_dist.choices import ShuffleOrder
from apr_dist.config import TrainConfig, flag_of
from apr_dist.config.schema import RENAMED
from apr_dist.errors import DamagedModelFile, UsageError
from apr_dist.gates.model_file import Progress
from apr_dist.parallel.optimizer_index import STATE_DAMAGED
from apr_dist.runs.folder import RunFolder, StepFolder
from apr_dist.runs.saved_state import SavedState, newest_whole, read_state

CHANGED = "FALSIFY-APR-DIST-CHECKPOINT-007"

NEVER, AUTO = "never", "auto"

_FREE = {
    *("run_dir", "overwrite", "resume", "resume_allow", "init", "dataset", "val_dataset", "tokenizer"),
    *("progress", "track", "device", "eval_every", "save_every", "micro_batch_size", "target_val_loss"),
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
        "loader.max_open_shards",
        "loader.max_unread",
        "loader.any_split",
        "evaluation.max_shared",
        "evaluation.sets",
        "evaluation.counts",
        "evaluation.prompts",
        "evaluation.answer_tokens",
        "compute.activation_checkpointing",
        "compute.kernels",
    ),
    *("early_stop.patience", "early_stop.min_evaluations", "evaluation.micro_batch_size", "log_every"),
}
"""Keys that change where and how often, not what is computed. Files are compared by content instead; a
mixture's fingerprint contains its weights."""

_FREE_SECTIONS = ("checkpoint.", "loader.mixture.", "evaluation.sets.", "tracking.")

_ORDER = ("seed", "seq_length", "loader.shuffle", "loader.block_sequences")
"""Keys that change which sequence comes when."""


@dataclass(frozen=True)
class ResumePoint:
    """A finished step folder, its state, and whether named settings differ from the saved ones."""

    folder: StepFolder
    state: SavedState
    changed: bool


_SAME = {("memory.weights", "split"): "f32"}
"""Values that stand for another one: what is saved and trained is the same bit for bit."""


def binding(config: TrainConfig) -> dict[str, Any]:
    """The settings that a resumed run must share with the run that was saved, by dotted key."""
    settings = flat(config.model_dump(mode="json")).items()
    return {key: _SAME.get((key, str(value)), value) for key, value in settings if not _is_free(key)}


def find_resume_point(
    config: TrainConfig, run: RunFolder, say: Callable[[str], None], progress: Progress = lambda *_: None
) -> ResumePoint | None:
    """The step folder ``--resume`` means, or None to begin at step 0; says which ones it skips.

    Raises:
        UsageError: a setting that alters the mathematics differs and is not named.
        DamagedModelFile: the folder that was named, or every one there is, is damaged.
    """
    if config.resume == NEVER:
        return None
    if config.resume != AUTO:
        folder = StepFolder(Path(config.resume))
        if not folder.path.name.isdecimal():
            raise UsageError(
                f"{folder.path} is not a step folder",
                where="--resume",
                expected=f"{NEVER}, {AUTO}, or a folder such as {run.steps / '000100'}",
                remedy=f"use --resume {AUTO} for the newest step of --run-dir",
            )
    elif (newest := newest_whole(run, lambda reason: say(f"skipped: {reason}"), progress)) is not None:
        folder = newest
    elif run.whole() and not config.overwrite:
        raise DamagedModelFile(
            f"none of the {len(run.whole())} step folders can be resumed",
            where=run.steps,
            expected="a step folder as it was saved",
            remedy="start a new run elsewhere with --run-dir, from the last model with --init",
            falsifier=STATE_DAMAGED,
        )
    else:
        return None
    state = read_state(folder, verify=config.resume != AUTO, progress=progress)  # the newest was compared
    changed = refuse_changes(config, folder, state)
    return ResumePoint(folder, _with_origin(config, folder, state, say), changed)


def refuse_changes(config: TrainConfig, folder: StepFolder, state: SavedState) -> bool:
    """Compare the configuration with the one the run began with.

    Returns:
        whether keys differ whose change was named.

    Raises:
        UsageError: naming the keys, with both values.
    """
    # A key that the saved configuration does not know had its default then.
    before = binding(TrainConfig()) | _saved(state)
    now = binding(config)
    differ = [key for key in sorted(now) if before.get(key) != now[key]]
    unnamed = [key for key in differ if key not in _named(config)]
    if unnamed:
        listed = "; ".join(f"{key} was {before.get(key)} and is {now[key]}" for key in unnamed[:5])
        raise UsageError(
            f"this is not the run that was saved: {listed}",
            where=folder.path,
            expected="the settings the run began with",
            remedy=f"give them again, or name what may change: {flag_of('resume_allow')} {','.join(unnamed)}",
            falsifier=CHANGED,
        )
    return bool(differ)


def refuse_other_inputs(
    config: TrainConfig, point: ResumePoint, provenance: Mapping[str, Any], *, init_digest: str | None
) -> None:
    """Compare data and init file of a resumed run with those it began with, by content.

    Held-out shards may change by name: ``--resume-allow val_dataset``.

    Raises:
        UsageError: naming both digests.
    """
    state = point.state
    pairs = [("training shards", state.data_fingerprint, provenance.get("data_fingerprint"))]
    if init_digest is not None:
        pairs.append(("init file", state.init_digest, init_digest))
    held_out = state.val_data_fingerprint
    if held_out is not None and "val_dataset" not in _named(config):
        pairs.append(("held-out shards", held_out, provenance.get("val_data_fingerprint")))
    for what, before, now in pairs:
        if before != now:
            name = "; or accept other held-out shards with --resume-allow val_dataset"
            raise UsageError(
                f"the {what} were {before} and are {now}",
                where=point.folder.path,
                expected="what the run began with",
                remedy="give the same files, or start a new run with --init on the checkpoint"
                + (name if what == "held-out shards" else ""),
                falsifier=CHANGED,
            )


def _with_origin(
    config: TrainConfig, folder: StepFolder, state: SavedState, say: Callable[[str], None]
) -> SavedState:
    """The state with the place in the data at which the present batch size begins to count.

    Raises:
        UsageError: the order has no such place.
    """
    before = _saved(state)
    for key in _ORDER:
        if key in before and before[key] != binding(config)[key]:
            say(f"{key} changed: sequences of this pass over the data may come again or be left out")
    earlier = int(before.get("batch_size", config.batch_size))
    if earlier == config.batch_size:
        return state
    batch, sequence = state.data_origin
    position = sequence + (state.step - batch) * earlier
    blocks = config.loader.shuffle is ShuffleOrder.BLOCK
    aligned = not blocks or (position % config.loader.block_sequences == 0)
    if config.loader.mixture or not aligned:
        raise UsageError(
            f"batch_size was {earlier} and is {config.batch_size}, and "
            + ("a mixture deals its shares by batches" if config.loader.mixture else "blocks would be split"),
            where=folder.path,
            expected="the batch size the run began with",
            remedy=f"give --batch-size {earlier}, or start a new run with --init on the checkpoint",
            falsifier=CHANGED,
        )
    return replace(state, data_origin=[state.step, position])


def _saved(state: SavedState) -> dict[str, Any]:
    """The saved settings by dotted key, under the names of this version."""
    return {RENAMED.get(key, key): value for key, value in flat(state.config).items()}


def _named(config: TrainConfig) -> set[str]:
    return {key.strip() for key in config.resume_allow.split(",")}


def _is_free(key: str) -> bool:
    return key in _FREE or key.startswith(_FREE_SECTIONS)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested mapping by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
