"""The run folder: every file name of a run, and which step folders count.

``RUN_DIR/steps/000120/`` holds ``checkpoint.apr``, each rank's ``optimizer-*.safetensors`` with their
index ``optimizer.json`` and, written last, ``state.json`` with the digests of model and index. A folder
without ``state.json`` was never finished and is never picked. ``RUN_DIR/checkpoint.apr`` is the model that
the run hands over, a second name of one step folder's file. Where an adapter is trained it is the adapter
alone, and ``adapter/`` beside it the same as ``peft`` reads it.

What ``state.json`` contains is in ``saved_state``; which run a folder belongs to is in ``history``.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apr_dist.atomic_files import flush_folder, temporary_beside, writing_to
from apr_dist.parallel.optimizer_index import INDEX_NAME

_ADAPTER = "adapter"


class _Inside:
    """A path of one name inside a folder."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, folder: StepFolder | RunFolder, _: object) -> Path:
        return folder.path / self._name


@dataclass(frozen=True)
class StepFolder:
    """One saved step."""

    path: Path

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return int(self.path.name)

    checkpoint = _Inside("checkpoint.apr")
    """The model, an APR file; of a run that trains an adapter, the adapter alone."""
    adapter = _Inside(_ADAPTER)
    """The adapter as ``peft`` reads it, where one is trained."""
    index = _Inside(INDEX_NAME)
    """The names and digests of the optimizer files."""
    state = _Inside("state.json")
    """The marker of a finished folder, written last."""

    def remove(self) -> None:
        """Delete the folder, marker first, so that a crash never leaves a marked part of it."""
        self.state.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)


@dataclass(frozen=True)
class RunFolder:
    """What one run leaves, by name."""

    path: Path

    checkpoint = _Inside("checkpoint.apr")
    """The model the run hands over, or its adapter."""
    adapter = _Inside(_ADAPTER)
    """The adapter that the run hands over, as ``peft`` reads it."""
    checkpoint_facts = _Inside("checkpoint.metadata.json")
    """Losses and digests of that model."""
    config = _Inside("config.yaml")
    """The resolved configuration."""
    metrics = _Inside("metrics.jsonl")
    """One JSON line per step, evaluation and event."""
    log = _Inside("train.log")
    """Everything the run printed."""
    verdict = _Inside("verdict.json")
    """How the run ended, and its gates."""
    history = _Inside("run.json")
    """The identity of the run and of the runs it continues."""
    trackers = _Inside("trackers.json")
    """What tells this run from an equal one in a tracker."""
    lock = _Inside("run.lock")
    """Locked by the process that trains into this folder."""
    steps = _Inside("steps")
    """The folder of step folders."""
    set_aside = _Inside("set-aside")
    """Abandoned step folders and what belongs to them, numbered."""

    def step(self, step: int) -> StepFolder:
        """The folder of one step, whether it exists or not."""
        return StepFolder(self.steps / f"{step:06d}")

    def contains(self, folder: StepFolder) -> bool:
        """Whether a step folder is one of this run folder's own."""
        return folder.path.resolve().parent == self.steps.resolve()

    def step_folders(self) -> list[StepFolder]:
        """Every step folder, finished or not, by number."""
        found = self.steps.iterdir() if self.steps.is_dir() else ()
        folders = [StepFolder(path) for path in found if path.name.isdecimal() and path.is_dir()]
        return sorted(folders, key=lambda one: one.step)

    def whole(self) -> list[StepFolder]:
        """The finished step folders, by number."""
        return [one for one in self.step_folders() if one.state.exists()]

    def hand_over(self, folder: StepFolder) -> None:
        """Let ``checkpoint.apr``, and ``adapter`` where there is one, be those of ``folder``.

        Raises:
            OutputError: a second name cannot be made; the previous one stands.
        """
        _second_name(folder.checkpoint, self.checkpoint)
        if folder.adapter.is_dir():
            with writing_to(self.adapter):
                self.adapter.mkdir(exist_ok=True)
            for file in sorted(folder.adapter.iterdir()):
                _second_name(file, self.adapter / file.name)

    def keep_apart(self, abandoned: Sequence[StepFolder]) -> Path:
        """Move step folders, newest first, out of the way together with a copy of what describes them.

        Returns:
            the folder they are in now.

        Raises:
            OutputError: they cannot be moved.
        """
        numbers = [int(one.name) for one in self.set_aside.glob("[0-9]*") if one.name.isdecimal()]
        target = self.set_aside / str(max(numbers, default=0) + 1)
        with writing_to(target):
            target.mkdir(parents=True)
            for file in (self.metrics, self.config, self.verdict, self.log):
                if file.is_file():
                    shutil.copyfile(file, target / file.name)
            for folder in sorted(abandoned, key=lambda one: -one.step):
                folder.path.rename(target / folder.path.name)
            flush_folder(self.steps)
        return target

    def clear(self) -> None:
        """Delete the files of an earlier run: step folders first, so that no crash leaves one to resume.

        Raises:
            OutputError: a file cannot be deleted.
        """
        with writing_to(self.path):
            for folder in self.step_folders():
                folder.state.unlink(missing_ok=True)
            for tree in (self.steps, self.set_aside, self.adapter):
                if tree.exists():
                    shutil.rmtree(tree)
            kept = (self.checkpoint, self.checkpoint_facts, self.verdict, self.metrics)
            for file in (self.history, self.trackers, *kept):
                file.unlink(missing_ok=True)


def _second_name(file: Path, name: Path) -> None:
    temporary = temporary_beside(name)
    with writing_to(name):
        try:
            temporary.hardlink_to(file)
        except OSError:  # a file system without hard links
            shutil.copyfile(file, temporary)
        temporary.replace(name)
