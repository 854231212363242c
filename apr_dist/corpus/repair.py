"""Rebuilding a lost or stale manifest from the shards.

Lives here: measuring what lies in a folder and saying how it differs from what was recorded. Comparing a
folder with its manifest lives in ``data.verification``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from apr_dist.corpus.publish import WORK_FOLDER
from apr_dist.corpus.tokenizer import load_tokenizer
from apr_dist.data.flags import VOCABULARY_LIMIT
from apr_dist.data.manifest import MANIFEST_NAME, Manifest, Shard
from apr_dist.data.manifest_file import FLAGGED_SCHEMA, SCHEMA, RecordedManifest, parse_manifest
from apr_dist.data.shard_files import (
    FINGERPRINTS_SUFFIX,
    INDEX_SUFFIX,
    read_shard_facts,
    refuse_link_out,
    shard_names,
)
from apr_dist.data.verification import check_documents, dataset_parts
from apr_dist.errors import DataError, ManifestError, ShardError

_NUMBERED = re.compile(r"shard-([0-9]+)\.bin")


@dataclass(frozen=True)
class RepairReport:
    """What a repair did.

    Attributes:
        manifest: as it was written.
        changed: how it differs from the manifest that was there, one sentence each.
        unknown: what the shards alone cannot tell, one phrase each.
    """

    manifest: Manifest
    changed: tuple[str, ...]
    unknown: tuple[str, ...]


def repair_manifest(
    folder: Path, *, tokenizer: Path | None = None, accept_loss: bool = False
) -> RepairReport:
    """Rebuild manifest.json from the shards; idempotent but for the time it records.

    What a manifest that is there says about origin and tokenizer is kept, since shards cannot tell; what it
    says about the shards is measured again.

    Args:
        folder: the shard folder.
        tokenizer: the tokenizer folder the ids came from, when the old manifest does not say.
        accept_loss: go on without shards that are missing.

    Raises:
        ManifestError: there are no shards, a shard is missing, or an unfinished encoding lies there.
        ShardError: a shard is no whole number of tokens, or holds ids beyond the vocabulary.
        OutputError: the manifest cannot be written.
    """
    names = _repairable(folder)
    recorded, listed, complaint = _salvage(folder)
    missing = _missing(folder, [shard.file for shard in listed], names)
    if missing and not accept_loss:
        raise ManifestError(
            f"{len(missing)} shard(s) are missing, such as {missing[0]}",
            where=folder,
            expected=f"{'every shard that is recorded' if listed else 'numbers without a gap'}",
            remedy=f"restore them, or accept the loss with `apr-dist tokenize repair-manifest {folder}"
            " --accept-loss`",
        )
    if {shard.file for shard in listed} == set(names):
        names = [shard.file for shard in listed]  # whatever order was trained on stays
    flagged = recorded.conversations is not None
    shards = tuple(read_shard_facts(folder, name, flagged=flagged) for name in names)
    _refuse_unknown_flags(folder, shards)
    manifest = _measured(folder, shards, recorded, tokenizer)
    _refuse_ids_beyond(manifest)
    misfits, measured = _misfitting_indexes(manifest), manifest
    if misfits:
        manifest = _without_index(manifest)
    unknown = _unknown(manifest)
    had_index = recorded.documents_index is not None
    changed = (
        [complaint]
        if complaint
        else list(_differences(recorded, listed, measured if had_index else manifest))
    )
    if had_index or complaint:
        changed += [f"no document boundaries are recorded any more: {problem}" for problem in misfits]
    note = f"could not know: {', '.join(unknown)}" if unknown else "nothing is missing"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = replace(manifest, repaired_at=now, note=note)
    manifest.write()
    return RepairReport(manifest=manifest, changed=tuple(changed), unknown=tuple(unknown))


def _repairable(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ManifestError("there is no such folder", where=folder, expected="a folder of shards")
    names = shard_names(folder)
    if not names:
        parts = [part for part in dataset_parts(folder) if part != folder and shard_names(part)]
        if (folder / WORK_FOLDER).is_dir():
            remedy = "run the interrupted `apr-dist tokenize encode-corpus` again: it goes on where it was"
        elif parts:
            remedy = f"name its parts one by one: {', '.join(str(part) for part in parts)}"
        else:
            remedy = "encode the corpus again with `apr-dist tokenize encode-corpus`"
        raise ManifestError("it holds no shards", where=folder, expected="files shard-*.bin", remedy=remedy)
    for name in names:
        refuse_link_out(folder, name)
    return names


def _missing(folder: Path, listed: Sequence[str], names: Sequence[str]) -> list[str]:
    """Shards that are recorded and not there; where nothing is recorded, gaps in the numbers.

    A file of documents without its shard is a record too: the last shard leaves no gap.
    """
    if listed:
        return sorted(set(listed) - set(names))
    beside = (path for path in folder.glob("shard-*") if path.suffix in (INDEX_SUFFIX, FINGERPRINTS_SUFFIX))
    if orphans := {path.with_suffix(".bin").name for path in beside} - set(names):
        return sorted(orphans)
    numbers = {int(found[1]): name for name in names if (found := _NUMBERED.fullmatch(name))}
    if len(numbers) < len(names):  # names of another tool
        return []
    return [f"shard-{number:05}.bin" for number in range(max(numbers)) if number not in numbers]


def _salvage(folder: Path) -> tuple[RecordedManifest, tuple[Shard, ...], str | None]:
    """The manifest that is there and its shards, or an empty one and why."""
    path = folder / MANIFEST_NAME
    try:
        recorded, table = parse_manifest(path.read_bytes(), where=path)
    except OSError:
        return RecordedManifest(schema=SCHEMA), (), "there was no manifest"
    except ManifestError as error:
        return RecordedManifest(schema=SCHEMA), (), f"the manifest could not be used: {error.what}"
    return recorded, tuple(Shard(*table.fields(index)) for index in range(len(table))) if table else (), None


def _measured(
    folder: Path, shards: tuple[Shard, ...], recorded: RecordedManifest, tokenizer: Path | None
) -> Manifest:
    has_index = all(shard.index_xxh3_64 is not None for shard in shards)
    documents = sum(shard.documents or 0 for shard in shards) if has_index else None
    identity, vocab_size = recorded.tokenizer, recorded.vocab_size
    if tokenizer is not None:
        identity = load_tokenizer(tokenizer).identity
        vocab_size = identity.id_bound
    return Manifest(
        folder=folder,
        shards=shards,
        vocab_size=vocab_size,
        tokenizer=identity,
        split=recorded.split,
        total_documents=documents,
        eos_policy=recorded.eos_policy,
        eos_token_id=recorded.eos_token_id,
        has_index=has_index,
        tokenizer_dir=recorded.tokenizer_dir if tokenizer is None else str(tokenizer),
        source=recorded.source_fields() or {"kind": "repair-manifest"},
        created_at=recorded.created_at,
        tool_version=recorded.tool_version,
        conversations=recorded.conversations,
    )


def _misfitting_indexes(manifest: Manifest) -> list[DataError]:
    """What is wrong with document indexes, such as that of a shard that was cut short since."""
    if not manifest.has_index:
        return []
    last = manifest.shards[-1]
    return [
        problem
        for shard in manifest.shards
        for problem in check_documents(manifest, shard, shard, is_last=shard is last)
    ]


def _without_index(manifest: Manifest) -> Manifest:
    shards = tuple(
        replace(shard, documents=None, index_xxh3_64=None, fingerprints_xxh3_64=None)
        for shard in manifest.shards
    )
    return replace(manifest, shards=shards, has_index=False, total_documents=None)


def _refuse_unknown_flags(folder: Path, shards: Sequence[Shard]) -> None:
    """Words with flags are no ids: what they mean was in the manifest alone."""
    for shard in shards:
        if (shard.max_id or 0) >= VOCABULARY_LIMIT:
            raise ShardError(
                "its words carry the flags of conversations, and no manifest describes them",
                where=folder / shard.file,
                expected=f"ids below {VOCABULARY_LIMIT:,}, or the manifest that encode-chat wrote",
                remedy="restore manifest.json, or encode again with `apr-dist tokenize encode-chat`",
            )


def _refuse_ids_beyond(manifest: Manifest) -> None:
    for shard in manifest.shards:
        if manifest.vocab_size is not None and (shard.max_id or 0) >= manifest.vocab_size:
            raise ShardError(
                f"it holds the id {shard.max_id}",
                where=manifest.path_of(shard),
                expected=f"ids below {manifest.vocab_size}, the tokenizer's bound",
                remedy="name the tokenizer the ids came from with --tokenizer",
            )


def _unknown(manifest: Manifest) -> list[str]:
    facts: dict[str, object] = {
        "the tokenizer": manifest.tokenizer,
        "the vocabulary size": manifest.vocab_size,
        "document boundaries": manifest.has_index or None,
        "the end-of-document policy": manifest.eos_policy,
        "the split": manifest.split,
        "the source documents": None if manifest.source.get("kind") == "repair-manifest" else "known",
    }
    return [name for name, fact in facts.items() if fact is None]


def _differences(recorded: RecordedManifest, listed: tuple[Shard, ...], manifest: Manifest) -> Iterator[str]:
    before = {shard.file: shard for shard in listed}
    now = {shard.file: shard for shard in manifest.shards}
    if recorded.schema not in (SCHEMA, FLAGGED_SCHEMA):
        yield f"the schema was {recorded.schema}"
    for name in sorted(before.keys() - now.keys()):
        yield f"{name} is gone"
    for name in sorted(now.keys() - before.keys()):
        yield f"{name} was not recorded"
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            yield f"{name} is not as it was recorded"
