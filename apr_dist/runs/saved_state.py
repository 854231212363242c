"""What ``state.json`` of a step folder contains, written last and read back with every digest compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from apr_dist.atomic_files import file_digest, flush_folder, write_atomically
from apr_dist.errors import DamagedModelFile
from apr_dist.gates.model_file import Progress
from apr_dist.parallel.optimizer_index import STATE_DAMAGED, read_index
from apr_dist.parsing import parse_json
from apr_dist.runs.folder import RunFolder, StepFolder
from apr_dist.runs.history import History

STATE_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """Everything a resumed run needs besides weights and moments; equal runs write equal bytes.

    Attributes:
        step: optimizer steps done; also the number of the next global batch.
        tokens_seen: target tokens trained on.
        train_loss: of the last step.
        grad_norm_max: largest norm so far.
        evaluations: every evaluation so far as [loss, tokens, ...].
        agreements: every comparison so far as [step, training loss, evaluation loss].
        config: the settings that a resumed run must share, by dotted key; older folders: all of them.
        config_digest: digest of the keys that change the mathematics.
        data_fingerprint: identity of the training shards; None for synthetic data.
        init_digest: digest of the init file the run began with; None from scratch.
        checkpoint_digest: of checkpoint.apr's bytes.
        optimizer_digest: of optimizer.json's bytes, which hold the digests of the other files.
        first_gates: the gates of step 0, as they were judged then.
        evaluated_at: step of the newest evaluation; None, in older folders: this one.
        guard: what the guard of the steps remembers.
        run: identity of the run; empty in older folders.
        val_data_fingerprint: identity of the held-out shards; None in older folders.
        evaluation: what the validation losses were measured on; None in older folders.
        data_origin: [global batch, sequence] from which on the present batch size counts.
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
    run: str = ""
    val_data_fingerprint: str | None = None
    evaluation: str | None = None
    data_origin: list[int] = field(default_factory=lambda: [0, 0])

    @property
    def evaluation_number(self) -> int:
        """Number of the newest evaluation; the one before the first step is 0."""
        return max(0, len(self.evaluations) - 1)

    @property
    def val_loss(self) -> float | None:
        """The validation loss of these very weights; None when they were not evaluated."""
        current = self.evaluated_at in (None, self.step) and self.evaluations
        return self.evaluations[-1][0] if current else None


def write_state(folder: StepFolder, state: SavedState) -> None:
    """Declare a step folder finished.

    Raises:
        OutputError: the marker cannot be written.
    """
    write_atomically(folder.state, (json.dumps(asdict(state), indent=2) + "\n").encode())
    flush_folder(folder.path.parent)


def read_state(
    folder: StepFolder, *, verify: bool = True, progress: Progress = lambda *_: None
) -> SavedState:
    """The state of a step folder, after comparing every file in it with its digest.

    Args:
        folder: the step folder.
        verify: off, the other files are not read.
        progress: called with what is done, and the bytes read of how many.

    Raises:
        DamagedModelFile: the marker is missing or malformed, or a file is not the one it names.
    """
    try:
        content = parse_json(folder.state.read_text(encoding="utf-8"))
        content.pop("epoch", None)  # of older versions: the number of the newest evaluation
        state = SavedState(**content)
    except (AttributeError, OSError, ValueError, TypeError) as error:
        raise _damaged(folder, folder.state.name, f"cannot be read ({error})") from error
    if state.version != STATE_VERSION:
        raise _damaged(folder, folder.state.name, f"has version {state.version}, not {STATE_VERSION}")
    if state.step != folder.step:
        raise _damaged(folder, folder.state.name, f"is the state of step {state.step}")
    if verify:
        named = {folder.checkpoint.name: state.checkpoint_digest, folder.index.name: state.optimizer_digest}
        _compare(folder, named, progress)
        _compare(folder, read_index(folder.path)["files"], progress)
    return state


def newest_whole(
    run: RunFolder, skipped: Callable[[str], None] = lambda _: None, progress: Progress = lambda *_: None
) -> StepFolder | None:
    """The newest step folder of this run whose files are what its marker says.

    Args:
        run: the run folder.
        skipped: called with the reason for each newer one that does not count.
        progress: as of `read_state`.
    """
    history = History.read(run)
    for folder in reversed(run.whole()):
        try:
            state = read_state(folder, progress=progress)
        except DamagedModelFile as damaged:
            skipped(str(damaged))
            continue
        if history is None or history.owns(state.run, state.step):
            return folder
        skipped(f"{folder.path} belongs to another run ({state.run[:12]})")
    return None


def best(run: RunFolder, evaluation: str | None, count: int = 1) -> list[tuple[StepFolder, float]]:
    """The finished step folders with the lowest validation losses, best first; the later of equal ones.

    Args:
        run: the run folder.
        evaluation: what a loss must have been measured on to be compared.
        count: how many at most.
    """
    losses = []
    for folder in run.whole():
        try:
            state = read_state(folder, verify=False)
        except DamagedModelFile:
            continue
        if state.val_loss is not None and state.evaluation == evaluation:
            losses.append((folder, state.val_loss))
    return sorted(losses, key=lambda pair: (pair[1], -pair[0].step))[:count]


def retire(
    run: RunFolder, *, keep_last: int, keep_every: int | None, keep_best: int, evaluation: str | None
) -> None:
    """Delete step folders beyond the newest, the best and the periodic ones; rank 0 alone.

    Called after a newer folder was finished and read back, so the last good one is never deleted.
    """
    whole = run.whole()
    kept = set(whole[-keep_last:])
    kept |= {folder for folder in whole if keep_every and folder.step % keep_every == 0}
    kept |= {folder for folder, _ in best(run, evaluation, keep_best)}
    for folder in run.step_folders():
        if folder not in kept:
            folder.remove()


def _compare(folder: StepFolder, digests: dict[str, str], progress: Progress) -> None:
    files = {name: folder.path / name for name in digests}
    of, done = sum(file.stat().st_size for file in files.values() if file.is_file()), 0

    def counted(size: int) -> None:
        nonlocal done
        done += size
        progress("comparing the saved step with its digests", done, of)

    for name, file in files.items():
        if not file.is_file() or file_digest(file, counted) != digests[name]:
            raise _damaged(folder, name, "is missing or not the file that was saved")


def _damaged(folder: StepFolder, name: str, what: str) -> DamagedModelFile:
    return DamagedModelFile(
        f"{name} {what}",
        where=folder.path / name,
        expected="a step folder as it was saved",
        remedy="resume from an earlier one with --resume PATH",
        falsifier=STATE_DAMAGED,
    )
