"""Proving that a shard folder is what its manifest says.

Lives here: reading every byte. The cheap checks when a folder is opened live in ``manifest``; rebuilding a
manifest from the shards lives in ``corpus.repair``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from apr_dist.data.flags import are_begins, are_targets, ids_of
from apr_dist.data.manifest import MANIFEST_NAME, Manifest, Shard
from apr_dist.data.manifest_file import Conversations
from apr_dist.data.shard_files import read_shard_facts, refuse_link_out, shard_names
from apr_dist.errors import DataError, ManifestError, ShardError


@dataclass(frozen=True)
class VerifyReport:
    """What reading every shard showed.

    Attributes:
        folders: the shard folders that were read.
        shards: how many shards.
        tokens: how many tokens.
        problems: every contradiction found; none means the data is what its manifests say.
        unchecked: what could not be checked, and why.
    """

    folders: tuple[Path, ...]
    shards: int
    tokens: int
    problems: tuple[DataError, ...]
    unchecked: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Nothing contradicts the manifests."""
        return not self.problems


def dataset_parts(folder: Path) -> tuple[Path, ...]:
    """The shard folders of a data set: ``folder`` itself, or its ``train`` and ``validation``."""
    if (folder / MANIFEST_NAME).exists():
        return (folder,)
    parts = tuple(part for name in ("train", "validation") if (part := folder / name).is_dir())
    return parts or (folder,)


def verify_dataset(folder: Path, *, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Check every hash, count, id bound and document boundary of a data set.

    Args:
        folder: a shard folder, or a data set with ``train`` and ``validation``.
        progress: called with (bytes read, bytes in all) after every shard.

    Raises:
        ManifestError: a manifest is missing or malformed, so that there is nothing to check against.
    """
    folders = dataset_parts(folder)
    manifests = [Manifest.load(part, check_files=False) for part in folders]
    total_bytes = sum(shard.bytes for manifest in manifests for shard in manifest.shards)
    problems: list[DataError] = []
    done_bytes = 0
    for manifest in manifests:
        for number, shard in enumerate(manifest.shards):
            problems += _check_shard(manifest, shard, is_last=number + 1 == len(manifest.shards))
            done_bytes += shard.bytes
            if progress is not None:
                progress(done_bytes, total_bytes)
        problems += _check_leftovers(manifest)
    return VerifyReport(
        folders=folders,
        shards=sum(len(manifest.shards) for manifest in manifests),
        tokens=sum(manifest.total_tokens for manifest in manifests),
        problems=tuple(problems),
        unchecked=tuple(warning for manifest in manifests for warning in manifest.warnings),
    )


def _check_shard(manifest: Manifest, shard: Shard, *, is_last: bool) -> Iterator[DataError]:
    path = manifest.path_of(shard)
    try:
        refuse_link_out(manifest.folder, shard.file)
        found = read_shard_facts(manifest.folder, shard.file, flagged=manifest.flagged)
    except DataError as error:
        yield error
        return
    recorded = asdict(shard)
    for key, value in asdict(found).items():
        if recorded[key] is not None and recorded[key] != value:
            yield ShardError(f"its {key} is {value}", where=path, expected=f"{recorded[key]}, as recorded")
    if manifest.vocab_size is not None and (found.max_id or 0) >= manifest.vocab_size:
        yield ShardError(
            f"it holds the id {found.max_id}", where=path, expected=f"ids below {manifest.vocab_size}"
        )
    if manifest.has_index:
        yield from check_documents(manifest, shard, found, is_last=is_last)
    if manifest.conversations is not None and found.tokens == shard.tokens:
        yield from _check_flags(manifest, manifest.conversations, shard)


def check_documents(manifest: Manifest, shard: Shard, found: Shard, *, is_last: bool) -> Iterator[DataError]:
    """Document starts rise from 0 and stay inside; the end marker stands where the policy puts it."""
    path = manifest.path_of(shard)
    try:
        starts = manifest.document_starts(shard)
    except ShardError as error:
        yield error
        return
    if shard.fingerprints_xxh3_64 is not None:
        try:
            manifest.document_fingerprints(shard)
        except ShardError as error:
            yield error
    steps = np.diff(starts.astype(np.int64), append=found.tokens)
    if not starts.size or starts[0] != 0 or (steps <= 0).any():
        yield ShardError("its document starts do not rise from 0 to its end", where=path)
        return
    end_id, policy = manifest.eos_token_id, manifest.eos_policy
    if end_id is None or policy not in ("between", "after"):
        return
    ids = np.memmap(path, dtype="<u4", mode="r")
    ends = np.append(starts[1:], found.tokens).astype(np.int64) - 1
    if policy == "between" and is_last:
        ends = ends[:-1]  # nothing comes after the last document
    missing = int((ids_of(ids[ends]) != end_id).sum())
    if missing:
        yield ShardError(
            f"{missing} documents do not end with the id {end_id}",
            where=path,
            expected=f"one at the end of each document (policy {policy})",
        )


def _check_flags(manifest: Manifest, rows: Conversations, shard: Shard) -> Iterator[DataError]:
    """Rows are whole, each begins a conversation or padding, and nothing that begins is a target."""
    path, length = manifest.path_of(shard), rows.seq_length
    words = np.memmap(path, dtype="<u4", mode="r")
    if words.size % length != 1 or words.size == 1:
        yield ShardError(
            f"it holds {words.size:,} tokens",
            where=path,
            expected=f"whole rows of {length:,} and one token that no row predicts",
        )
        return
    begins = are_begins(words)
    broken = {
        "rows do not begin with a conversation": int((~begins[::length]).sum()),
        "tokens that begin a conversation are targets": int((begins & are_targets(words)).sum()),
    }
    if manifest.has_index:
        try:
            starts = manifest.document_starts(shard).astype(np.int64)
        except ShardError:
            return  # reported already
        inside = starts[starts < words.size]
        broken["recorded conversations do not begin where they are recorded"] = int((~begins[inside]).sum())
    for what, count in broken.items():
        if count:
            yield ShardError(
                f"{count:,} {what}",
                where=path,
                expected="flags as `apr-dist tokenize encode-chat` writes them",
                remedy="encode the conversations again",
            )


def _check_leftovers(manifest: Manifest) -> Iterator[DataError]:
    extra = sorted(set(shard_names(manifest.folder)) - {shard.file for shard in manifest.shards})
    if extra:
        yield ManifestError(
            f"{len(extra)} shards are not in the manifest, such as {extra[0]}",
            where=manifest.folder,
            remedy=f"remove them, or take them in with `apr-dist tokenize repair-manifest {manifest.folder}`",
        )
