"""The index of a step folder's optimizer files, ``optimizer.json``: their names and digests. No PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from apr_dist.errors import DamagedModelFile
from apr_dist.parsing import parse_json

STATE_DAMAGED = "FALSIFY-APR-DIST-CHECKPOINT-006"
INDEX_NAME = "optimizer.json"
FORMAT = "apr-dist-adamw-v2"


def index_text(digests: dict[str, str], *, updates: int) -> bytes:
    """Content of the index: the files of a step folder's state and how many updates it has seen."""
    return (json.dumps({"format": FORMAT, "updates": updates, "files": digests}, indent=2) + "\n").encode()


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a step folder's training state.

    Raises:
        DamagedModelFile: there is none, or it is not one.
    """
    path = folder / INDEX_NAME
    try:
        index = parse_json(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT or not index["files"]:
            raise ValueError(f"format {index['format']} with {len(index['files'])} files")
        int(index["updates"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged_state(path, f"the index of the training state cannot be read ({error})") from error
    found: dict[str, Any] = index
    return found


def damaged_state(path: Path, what: str) -> DamagedModelFile:
    """The error of a file that is not part of a saved state."""
    return DamagedModelFile(
        what,
        where=path,
        expected="the training state that was saved with this checkpoint, in a folder every machine sees",
        remedy="resume from an earlier step folder, or start from checkpoint.apr with --init",
        falsifier=STATE_DAMAGED,
    )
