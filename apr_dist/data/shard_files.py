"""Shard files as they lie in a folder: their names, sizes and the facts that follow from their bytes.

Lives here: listing, the cheap check against a manifest (sizes only), and the full reading of one shard
(hashes, id bounds). What a manifest records lives in ``manifest_file``.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from apr_dist.data.flags import are_targets, ids_of
from apr_dist.data.manifest_file import Shard
from apr_dist.errors import ManifestError, ShardError

MANIFEST_NAME = "manifest.json"
INDEX_SUFFIX = ".idx"
FINGERPRINTS_SUFFIX = ".docs"
"""Sidecars of a shard: u64 document starts; u64 hashes of its documents' texts."""
_SHARD_NAME = re.compile(r"shard-.*\.bin")
_DIGITS = re.compile(r"(\d+)")
_READ_BYTES = 1 << 22
_LARGEST_ID = 2**32 - 1


def shard_names(folder: Path) -> list[str]:
    """Names ``shard-*.bin`` in ``folder``, in reading order: numbers in a name count as numbers."""
    names = [entry.name for entry in os.scandir(folder) if _SHARD_NAME.fullmatch(entry.name)]
    return sorted(names, key=_by_number)


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdecimal() else 0, part) for part in _DIGITS.split(name)]


def remove_shard(folder: Path, name: str) -> None:
    """Remove a shard and its sidecars, as far as they are there."""
    for suffix in (".bin", INDEX_SUFFIX, FINGERPRINTS_SUFFIX):
        (folder / name).with_suffix(suffix).unlink(missing_ok=True)


def check_shard_files(folder: Path, shards: Sequence[Shard]) -> None:
    """Compare every shard file's size with the recorded one; links must not leave the folder.

    Raises:
        ManifestError: a name is a link that leads out of the folder.
        ShardError: a shard is missing, is no regular file, or has another size.
    """
    with os.scandir(folder) as entries:
        present = {entry.name: entry for entry in entries}
    for shard in shards:
        entry = present.get(shard.file)
        if entry is None:
            raise ShardError(
                "the shard is missing",
                where=folder / shard.file,
                expected=f"{shard.bytes} bytes, as its manifest says",
                remedy=f"restore it, or accept its loss with `apr-dist tokenize repair-manifest {folder}"
                " --accept-loss`",
            )
        if entry.is_symlink():
            refuse_link_out(folder, shard.file)
        if not entry.is_file():
            raise ShardError("it is not a regular file", where=folder / shard.file)
        _check_size(folder, shard, entry.stat().st_size)


def shards_of_older_folder(folder: Path) -> tuple[Shard, ...]:
    """The shards of a folder whose manifest does not list them, known only by name and size.

    Raises:
        ManifestError: a shard is a link that leads out of the folder.
        ShardError: a size is no multiple of 4.
    """
    shards = []
    for name in shard_names(folder):
        refuse_link_out(folder, name)
        size = (folder / name).stat().st_size
        shard = Shard(file=name, tokens=size // 4, bytes=size)
        _check_size(folder, shard, size)
        shards.append(shard)
    return tuple(shards)


def refuse_link_out(folder: Path, name: str) -> None:
    """Refuse a file that is a link to somewhere outside ``folder``.

    Raises:
        ManifestError: naming the link and where it leads, or that it leads to itself.
    """
    try:
        target = (folder / name).resolve()
    except (OSError, RuntimeError) as error:  # a circle, in the words of this or that Python
        raise ManifestError(f"{name} is a link that leads nowhere ({error})", where=folder) from error
    if target.parent != folder.resolve():
        raise ManifestError(
            f"{name} is a link to {target}", where=folder, expected="shards that lie inside the folder"
        )


def read_shard_facts(folder: Path, name: str, *, flagged: bool = False) -> Shard:
    """Read a shard and its document index once, in bounded memory, and say everything about them.

    Args:
        folder: where it lies.
        name: its file.
        flagged: its words carry flags beside the ids (`flags`).

    Raises:
        ShardError: unreadable, or its size is no multiple of 4.
    """
    import numpy as np  # noqa: PLC0415  (listing a folder does not need numpy)
    import xxhash  # noqa: PLC0415

    quick, full, size = xxhash.xxh3_64(), hashlib.sha256(), 0
    smallest: int | None = None
    largest: int | None = None
    targets = 0
    path = folder / name
    try:
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                quick.update(block)
                full.update(block)
                size += len(block)
                ids = np.frombuffer(block, dtype="<u4", count=len(block) // 4)
                if flagged:
                    targets += int(np.count_nonzero(are_targets(ids)))
                    ids = ids_of(ids)
                if ids.size:
                    smallest = min(int(ids.min()), _LARGEST_ID if smallest is None else smallest)
                    largest = max(int(ids.max()), largest or 0)
    except OSError as error:
        raise ShardError(f"the shard cannot be read ({error.strerror})", where=path) from error
    shard = Shard(
        file=name,
        tokens=size // 4,
        bytes=size,
        xxh3_64=quick.hexdigest(),
        sha256=full.hexdigest(),
        min_id=smallest,
        max_id=largest,
        targets=targets if flagged else None,
    )
    _check_size(folder, shard, size)
    for suffix, key in ((INDEX_SUFFIX, "index_xxh3_64"), (FINGERPRINTS_SUFFIX, "fingerprints_xxh3_64")):
        sidecar = path.with_suffix(suffix)
        if sidecar.is_file() and not sidecar.is_symlink():
            content = sidecar.read_bytes()
            documents = shard.documents if shard.documents is not None else len(content) // 8
            facts: dict[str, Any] = {key: xxhash.xxh3_64_hexdigest(content), "documents": documents}
            shard = replace(shard, **facts)
    return shard


def _check_size(folder: Path, shard: Shard, size: int) -> None:
    """FALSIFY-REPAIR-MANIFEST: a shard is whole u32 ids, and as many as were recorded."""
    if size == shard.bytes == 4 * shard.tokens:
        return
    if size == shard.bytes:
        expected, remedy = "whole tokens of 4 bytes", "restore the shard from its source"
    else:
        expected = f"{shard.bytes} bytes, as its manifest says"
        remedy = "restore the shard, or accept it as it is"
    remedy += f" (`apr-dist tokenize repair-manifest {folder}`; only whole tokens are accepted)"
    raise ShardError(
        f"the shard holds {size} bytes", where=folder / shard.file, expected=expected, remedy=remedy
    )


def read_manifest_file(folder: Path) -> bytes:
    """The bytes of a folder's manifest.json.

    Raises:
        ManifestError: there is none, or it cannot be read.
    """
    path = folder / MANIFEST_NAME
    try:
        if not folder.is_dir():
            found = "a file stands there" if folder.exists() else "there is no such folder"
            raise ManifestError(found, where=folder, expected="a shard folder with manifest.json")
        if path.exists() and not path.is_file():  # reading a FIFO would wait for ever
            raise ManifestError("it is no regular file", where=path, expected="a file of JSON")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ManifestError(
            "the folder has no manifest.json",
            where=folder,
            expected="a shard folder",
            remedy=how_to_get_a_manifest(folder),
        ) from error
    except PermissionError as error:
        raise ManifestError(
            "it may not be read (permission denied)",
            where=path,
            expected="a folder and a manifest that the user of this run may read",
            remedy=f"chmod -R u+rX {folder}, or run as their owner",
        ) from error
    except OSError as error:
        raise ManifestError(f"it cannot be read ({error.strerror})", where=path) from error


def how_to_get_a_manifest(folder: Path) -> str:
    """The command that makes a manifest there, or the folders that have one."""
    parts = [part.name for part in sorted(folder.iterdir()) if (part / MANIFEST_NAME).is_file()]
    if parts:
        return f"name one of its parts: {', '.join(str(folder / part) for part in parts)}"
    if shard_names(folder):
        return f"apr-dist tokenize repair-manifest {folder}"
    return f"apr-dist tokenize encode-corpus --corpus PATH --tokenizer DIR --output {folder}"
