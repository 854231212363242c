"""The step folders of a run: which are whole, which is newest, which may go.

``run_dir/steps/000120/`` holds ``checkpoint.apr``, each rank's ``optimizer-*.safetensors`` with their
index ``optimizer.json`` and, written last, ``state.json`` with the digests of model and index: a folder
without it was never finished and is never picked.
``run_dir/checkpoint.apr`` is the newest whole folder's file under a second name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from apr_dist.atomic_files import flush_folder, write_atomically, writing_to
from apr_dist.errors import DamagedModelFile
from apr_dist.parallel.state import INDEX_NAME, STATE_DAMAGED, file_digest, read_index
from apr_dist.parsing import parse_json

CHECKPOINT_NAME = "checkpoint.apr"
STATE_NAME = "state.json"
STEPS = "steps"
STATE_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """Everything a resumed run needs besides weights and moments.

    Attributes:
        step: optimizer steps done; also the number of the next global batch.
        tokens_seen: target tokens trained on.
        train_loss: of the last step.
        grad_norm_max: largest norm so far.
        evaluations: every evaluation so far as [loss, tokens, seconds].
        agreements: every comparison so far as [step, training loss, evaluation loss].
        config: the resolved configuration.
        config_digest: digest of the keys that change the mathematics.
        data_fingerprint: identity of the training shards; None for made-up data.
        init_digest: digest of the init file the run began with; None from scratch.
        checkpoint_digest: of checkpoint.apr's bytes.
        optimizer_digest: of optimizer.json's bytes, which hold the digests of the other files.
        first_gates: the gates of step 0, as they were judged then.
        evaluated_at: step of the newest evaluation; None, in older folders: this one.
        guard: what the guard of the steps remembers.
    """

    step: int
    tokens_seen: int
    train_loss: float | None
    grad_norm_max: float
    evaluations: list[list[float]]
    agreements: list[list[float]]
    config: dict[str, Any]
    config_digest: str
    data_fingerprint: str | None
    init_digest: str | None
    checkpoint_digest: str = ""
    optimizer_digest: str = ""
    first_gates: list[dict[str, Any]] = field(default_factory=list)
    evaluated_at: int | None = None
    guard: dict[str, Any] = field(default_factory=dict)
    version: int = STATE_VERSION


def step_folder(run_dir: Path, step: int) -> Path:
    """Where step ``step`` is saved."""
    return run_dir / STEPS / f"{step:06d}"


def finish(folder: Path, run_dir: Path, state: SavedState) -> None:
    """Declare a step folder whole, and let ``run_dir/checkpoint.apr`` be its model.

    Raises:
        OutputError: the marker or the second name cannot be written; the previous one stands.
    """
    write_atomically(folder / STATE_NAME, (json.dumps(asdict(state), indent=2) + "\n").encode())
    flush_folder(folder.parent)
    temporary = run_dir / f".{CHECKPOINT_NAME}.{os.getpid()}.tmp"
    with writing_to(run_dir / CHECKPOINT_NAME):
        temporary.unlink(missing_ok=True)
        try:
            temporary.hardlink_to(folder / CHECKPOINT_NAME)
        except OSError:  # a file system without hard links
            shutil.copyfile(folder / CHECKPOINT_NAME, temporary)
        temporary.replace(run_dir / CHECKPOINT_NAME)


def whole_folders(run_dir: Path) -> list[Path]:
    """Step folders that were finished, oldest first."""
    return sorted(path.parent for path in (run_dir / STEPS).glob(f"[0-9]*/{STATE_NAME}"))


def newest_whole(
    run_dir: Path, passed_over: Callable[[DamagedModelFile], None] = lambda _: None
) -> Path | None:
    """The newest step folder whose files are what its marker says.

    Args:
        run_dir: the run folder.
        passed_over: called with what is wrong with each newer one.
    """
    for folder in reversed(whole_folders(run_dir)):
        try:
            read_state(folder)
        except DamagedModelFile as damaged:
            passed_over(damaged)
        else:
            return folder
    return None


def read_state(folder: Path) -> SavedState:
    """The state of a step folder, after comparing every file in it with its digest.

    Raises:
        DamagedModelFile: the marker is missing or malformed, or a file is not the one it names.
    """
    path = folder / STATE_NAME
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        content.pop("epoch", None)  # of older versions: the number of the newest evaluation
        state = SavedState(**content)
    except (AttributeError, OSError, ValueError, TypeError) as error:
        raise _damaged(path, f"the state cannot be read ({error})") from error
    if state.version != STATE_VERSION:
        raise _damaged(path, f"it is of version {state.version}, and {STATE_VERSION} is read here")
    _compare(folder, {CHECKPOINT_NAME: state.checkpoint_digest, INDEX_NAME: state.optimizer_digest})
    _compare(folder, read_index(folder)["files"])
    return state


def _compare(folder: Path, digests: dict[str, str]) -> None:
    for name, digest in digests.items():
        file = folder / name
        if not file.is_file() or file_digest(file) != digest:
            raise _damaged(file, "it is missing or not the file that was saved")


def retire(run_dir: Path, *, keep_last: int, keep_every: int | None) -> None:
    """Remove whole folders beyond the newest ``keep_last``, and every unfinished one; rank 0 alone.

    Called after a newer folder was finished and read back, so the last good one is never the victim.
    """
    whole = whole_folders(run_dir)
    kept = set(whole[-keep_last:])
    kept |= {folder for folder in whole if keep_every and int(folder.name) % keep_every == 0}
    for folder in (run_dir / STEPS).iterdir():
        if folder not in kept:
            (folder / STATE_NAME).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def _damaged(path: Path, what: str) -> DamagedModelFile:
    return DamagedModelFile(
        what,
        where=path,
        expected="a step folder as it was saved",
        remedy="resume from an earlier one with --resume PATH",
        falsifier=STATE_DAMAGED,
    )
