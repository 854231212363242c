"""Opening the run folder: whether a run may write into it, and what happens to what is there.

A fresh run deletes what an earlier one left (only with ``--overwrite``); a resumed run keeps its history and
sets aside the steps it leaves behind. Both happen before the first step, after every gate has passed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apr_dist.atomic_files import write_atomically
from apr_dist.config import TrainConfig
from apr_dist.errors import OutputError
from apr_dist.gates.output import OCCUPIED, check_run_dir, create_run_dir
from apr_dist.runs.display import Display
from apr_dist.runs.folder import RunFolder, StepFolder
from apr_dist.runs.history import History, identity
from apr_dist.runs.lock import RunLock
from apr_dist.runs.log import RunLog
from apr_dist.runs.resume import AUTO, ResumePoint
from apr_dist.runs.saved_state import SavedState

BYTES_PER_WEIGHT = 12
"""A step folder holds a weight and its two AdamW moments, each in f32."""


def check_folder(config: TrainConfig, run: RunFolder, point: ResumePoint | None, *, parameters: int) -> None:
    """Refuse, before anything is trained, a folder that this run may not write into; creates nothing.

    Args:
        config: the resolved configuration.
        run: its run folder.
        point: the step folder to resume; None for a fresh run.
        parameters: elements of the model.

    Raises:
        OutputError: it belongs to another run, is not writable, the disk is too full, or overwriting it
            would delete the init file.
    """
    own = point is not None and run.contains(point.folder)
    # Begun and stopped before its first save, a run that resumes by itself begins again.
    begun = config.resume == AUTO and not run.checkpoint.exists() and not run.whole()
    if not own and config.init is not None and _is_deleted(run, config.init):
        raise OutputError(
            f"overwriting this folder deletes the init file {config.init}",
            where=run.path,
            expected="an init file outside of the files that are replaced",
            remedy="choose another --run-dir",
            falsifier=OCCUPIED,
        )
    keep = config.checkpoint
    check_run_dir(
        run.path,
        overwrite=config.overwrite or own or begun,
        needed_bytes=parameters * BYTES_PER_WEIGHT * (keep.keep_last + keep.keep_best + 1),
        ignored=(run.lock.name,),
    )


def open_folder(
    config: TrainConfig,
    run: RunFolder,
    lock: RunLock,
    display: Display,
    *,
    resumed: SavedState | None,
    folder: Path | None,
    changed: bool,
    provenance: Mapping[str, Any],
) -> str:
    """Make the run folder ready for this run; rank 0 alone.

    Args:
        config: the resolved configuration.
        run: its run folder.
        lock: taken here if the folder is new.
        display: prints what is set aside; a log begins to be written.
        resumed: state of the step folder to resume; None for a fresh run.
        folder: that step folder.
        changed: whether settings differ from the saved ones by name.
        provenance: digests of data and init.

    Returns:
        the identity of the run.

    Raises:
        OutputError: another process is in the folder, or a file cannot be replaced.
    """
    create_run_dir(run.path)
    lock.take()
    facts = (config.digest(), *(provenance.get(key) for key in ("init_digest", "data_fingerprint")))
    if resumed is None or folder is None:
        run.clear()
        history = History(identity(*facts))
    elif run.contains(step := StepFolder(folder)):
        history = _continued(run, step, resumed, display, branch=changed, facts=facts)
    else:
        run.clear()
        earlier = RunFolder(step.path.parent.parent)
        if earlier.metrics.is_file():
            shutil.copyfile(earlier.metrics, run.metrics)
        display(f"continues {earlier.path} after step {step.step}")
        history = History(resumed.run).branch(step.step, *facts)
    if isinstance(display, RunLog):
        display.keep_in(run.log, append=resumed is not None)
    history.write(run)
    run.verdict.unlink(missing_ok=True)
    write_atomically(run.config, config.to_yaml().encode())
    return history.run


def _continued(
    run: RunFolder,
    step: StepFolder,
    resumed: SavedState,
    display: Display,
    *,
    branch: bool,
    facts: tuple[object, ...],
) -> History:
    """Set aside what lies behind the step to resume, and say so."""
    abandoned = [one for one in run.whole() if one.step > step.step]
    if not run.verdict.exists():
        display("the attempt before this one left no verdict: it was killed, or its host was lost")
    if abandoned:
        target = run.keep_apart(abandoned)
        run.hand_over(step)
        steps = ", ".join(str(one.step) for one in abandoned)
        display(f"set aside in {target}: step {steps}, with the metrics and the configuration they came from")
    history = History.read(run) or History(resumed.run or identity(*facts))
    return history.branch(step.step, *facts) if branch or abandoned else history


def _is_deleted(run: RunFolder, init: Path) -> bool:
    inside = init.resolve()
    return inside == run.checkpoint.resolve() or run.steps.resolve() in inside.parents
