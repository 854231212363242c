"""Gate: the shards hold at least one sequence, and nothing held out is also trained on."""

from __future__ import annotations

from apr_dist.data.manifest import Manifest
from apr_dist.errors import DataError, UsageError

TOO_SHORT = "FALSIFY-APR-DIST-LOADER-001"
SHARED = "FALSIFY-APR-DIST-TRAINER-011"


def check_batch(*, batch_size: int, micro_batch: int, world_size: int) -> None:
    """The global batch divides over processes and micro-batches.

    Raises:
        UsageError: naming the three numbers.
    """
    if batch_size % (world_size * micro_batch):
        raise UsageError(
            f"batch_size {batch_size} does not divide into micro-batches of {micro_batch} on {world_size}"
            " rank(s)",
            where="--batch-size",
            expected=f"a multiple of {world_size * micro_batch}",
            remedy="change --batch-size or --micro-batch-size",
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
