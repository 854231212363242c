"""Moving a finished data set from its work folder to where readers look for it.

Lives here: what counts as an existing data set, and the order of moves that leaves no readable half: the old
manifest goes first, the new one comes last, and a move that was interrupted can be repeated.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from apr_dist.atomic_files import flush_folder, writing_to
from apr_dist.data.manifest import MANIFEST_NAME, Manifest
from apr_dist.data.shard_files import remove_shard, shard_names
from apr_dist.errors import OutputError

WORK_FOLDER = ".encoding"
SOURCES_NAME = "sources.jsonl"
_PARTS = (".", "train", "validation")


def refuse_existing(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that holds a data set already, or is no folder.

    Raises:
        OutputError: it does, and ``overwrite`` is off; or a file stands there.
    """
    if output.exists() and not output.is_dir():
        raise OutputError("a file stands there", where=output, expected="a folder, or nothing yet")
    if overwrite:
        return
    for part in _PARTS:
        folder = output / part
        if folder.is_dir() and (shard_names(folder) or (folder / MANIFEST_NAME).exists()):
            raise OutputError(
                "a data set lies there already",
                where=folder,
                remedy="choose another output or pass --force",
            )


def publish(output: Path, work: Path, splits: Mapping[str, Path]) -> dict[str, Manifest]:
    """Move every split's files from ``work`` to its folder and remove ``work``; safe to repeat.

    Args:
        output: the data set's folder.
        work: holds one folder a split, each with shards and manifest.
        splits: where each split's files go.

    Raises:
        OutputError: a file cannot be moved.
    """
    with writing_to(output):
        for name, target in splits.items():
            if (work / name / MANIFEST_NAME).exists():
                _move(work / name, target)
        for part in _PARTS:
            folder = output / part
            if folder.resolve() not in {target.resolve() for target in splits.values()}:
                _remove_data_set(folder)
        shutil.rmtree(work)
        flush_folder(output)
    return {name: Manifest.load(target) for name, target in splits.items()}


def _move(made: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    (target / MANIFEST_NAME).unlink(missing_ok=True)
    kept = {shard.file for shard in Manifest.load(made, check_files=False).shards}
    for stale in set(shard_names(target)) - kept:
        remove_shard(target, stale)
    for path in sorted(made.iterdir()):
        if path.name != MANIFEST_NAME:
            path.replace(target / path.name)
    flush_folder(target)
    (made / MANIFEST_NAME).replace(target / MANIFEST_NAME)
    flush_folder(target)


def _remove_data_set(folder: Path) -> None:
    """Remove the files of a data set that the new layout would leave behind; nothing else."""
    if not (folder / MANIFEST_NAME).exists():
        return
    (folder / MANIFEST_NAME).unlink()
    for name in shard_names(folder):
        remove_shard(folder, name)
    (folder / SOURCES_NAME).unlink(missing_ok=True)
