"""Gate: the shards hold at least one sequence, and nothing held out is also trained on."""

from __future__ import annotations

from apr_dist.data.manifest import Manifest
from apr_dist.errors import DataError, UsageError

TOO_SHORT = "FALSIFY-APR-DIST-LOADER-001"
SHARED = "FALSIFY-APR-DIST-TRAINER-011"


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
    sequences = sum(max(0, shard.tokens - 1) // seq_length for shard in manifest.shards)
    if not sequences:
        longest = max(shard.tokens for shard in manifest.shards)
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
