"""Gate: the shards hold at least one sequence, and nothing held out is also trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from apr_dist.data.manifest import Manifest
from apr_dist.errors import DataError, UsageError

TOO_SHORT = "FALSIFY-APR-DIST-LOADER-001"
SHARED = "FALSIFY-APR-DIST-TRAINER-011"
WORTH_A_WARNING = 0.01
"""Share of the tokens that is never read, above which a run says so."""


def check_batch(*, batch_size: int, micro_batch: int | None, world_size: int) -> None:
    """The global batch divides over processes and micro-batches.

    Args:
        batch_size: sequences of a step, over all processes.
        micro_batch: sequences per process and forward; None: whatever a process gets.
        world_size: processes.

    Raises:
        UsageError: naming the numbers, and the batch sizes next to this one that would do.
    """
    unit = world_size * (micro_batch or 1)
    if not batch_size % unit:
        return
    below = batch_size // unit * unit
    near = f"{below} or {below + unit}" if below else f"{unit}"
    each = f"micro-batches of {micro_batch} on " if micro_batch else ""
    raise UsageError(
        f"batch_size {batch_size} does not divide into {each}{world_size} rank(s)",
        where="--batch-size",
        expected=f"a multiple of {unit}",
        remedy=f"use --batch-size {near}" + (", or change --micro-batch-size" if micro_batch else ""),
    )


def check_sequences(manifest: Manifest, *, seq_length: int) -> int:
    """At least one shard is longer than a sequence.

    Returns:
        Sequences per pass over the data; windows overlap by the one token that is only a target.

    Raises:
        DataError: naming the sequence length and the longest shard.
    """
    sequences = manifest.sequences(seq_length)
    if not sequences:
        longest = manifest.longest_shard
        raise DataError(
            f"the longest shard holds {longest:,} tokens and a sequence needs {seq_length + 1:,}",
            where=manifest.folder,
            expected="at least one whole sequence",
            remedy="lower --seq-length or encode more text",
            falsifier=TOO_SHORT,
        )
    return sequences


def check_disjoint(training: Manifest, held_out: Manifest) -> None:
    """No shard is on both sides.

    Raises:
        DataError: naming the first shard that is.
    """
    trained = {shard.sha256: shard.file for shard in training.shards if shard.sha256}
    for shard in held_out.shards:
        copied = shard.sha256 is not None and shard.sha256 in trained
        if copied or training.path_of(shard).resolve() == held_out.path_of(shard).resolve():
            raise DataError(
                f"{shard.file} is also training shard {trained[str(shard.sha256)] if copied else shard.file}",
                where=held_out.folder,
                expected="held-out shards that are not trained on",
                remedy="encode with --val-fraction, and pass its train and validation folders",
                falsifier=SHARED,
            )


def check_unread(manifest: Manifest, *, seq_length: int, block: int, limit: float) -> str | None:
    """The tokens that no sequence reaches, at the ends of shards, are few.

    Args:
        manifest: a data set.
        seq_length: tokens predicted per sequence.
        block: sequences that are read together; what is left over for one is not read.
        limit: the largest share of the tokens that may stay unread.

    Returns:
        A warning where they are not quite so few.

    Raises:
        DataError: with the share and the shard size that would do.
    """
    targets = max(1, manifest.total_tokens - manifest.shard_count)
    read = manifest.sequences(seq_length * block) * block * seq_length
    share = 1 - read / targets
    if share <= min(limit, WORTH_A_WARNING):
        return None
    mean = manifest.total_tokens // manifest.shard_count
    what = (
        f"{share:.1%} of the tokens are never read: shards hold {mean:,} tokens on average, and the rest of"
        f" each behind its last whole"
        f" {'block' if block > 1 else 'sequence'} of {seq_length * block:,} is left over"
    )
    remedy = f"encode the corpus again with --shard-tokens {100 * seq_length * block} or more"
    if share > limit:
        raise DataError(
            what,
            where=manifest.folder,
            expected=f"at most {limit:.1%} (loader.max_unread)",
            remedy=f"{remedy}, shorten the sequence, or raise --loader.max-unread",
        )
    return f"{manifest.folder}: {what}; {remedy}"


def check_splits(training: Sequence[Manifest], held_out: Manifest, *, allowed: bool) -> None:
    """Each side is given the part of a split that was made for it.

    Raises:
        DataError: naming the folder and the part that it is.
    """
    for manifest, wrong, flag in (
        *((part, "validation", "--dataset") for part in training),
        (held_out, "train", "--val-dataset"),
    ):
        if manifest.split == wrong and not allowed:
            raise DataError(
                f"it is the {wrong} part of its data set",
                where=manifest.folder,
                expected=f"another one for {flag}",
                remedy="swap the folders, or pass --loader.any-split if it is meant so",
                falsifier=SHARED,
            )


def check_shared_documents(
    training: Sequence[Manifest], held_out: Manifest, *, limit: float
) -> tuple[str, str | None]:
    """Hardly any held-out document is also trained on, whatever shards they lie in.

    Args:
        training: the training sets.
        held_out: the held-out set.
        limit: the largest share of its documents that may be in a training set as well.

    Returns:
        What was found, and a warning where documents could not be compared or are shared.

    Raises:
        DataError: with the number of documents on both sides.
    """
    unknown = [part.folder for part in (*training, held_out) if not part.has_fingerprints]
    if unknown:
        return "documents not compared", (
            f"{unknown[0]}: it records no document fingerprints, so that documents on both sides cannot be"
            " found; encode the corpus again to have them compared"
        )
    held = np.concatenate([held_out.document_fingerprints(shard) for shard in held_out.shards])
    known = np.unique(held)
    seen = np.zeros(known.size, dtype=bool)
    for part in training:
        for shard in part.shards:
            fingerprints = part.document_fingerprints(shard)
            places = known.searchsorted(fingerprints).clip(max=known.size - 1)
            seen[places[known[places] == fingerprints]] = True
    shared = int(np.isin(held, known[seen]).sum())
    found = f"{shared:,} of {held.size:,} held-out documents trained on"
    if shared > limit * held.size:
        raise DataError(
            f"{shared:,} of its {held.size:,} documents are also trained on",
            where=held_out.folder,
            expected=f"at most a share of {limit:g} (evaluation.max_shared)",
            remedy="split the corpus with encode-corpus --val-fraction, which never puts equal texts on both"
            " sides, or raise --evaluation.max-shared",
            falsifier=SHARED,
        )
    return found, f"{held_out.folder}: {found}" if shared else None
