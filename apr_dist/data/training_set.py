"""What a run trains on, by the paths it was given: one shard folder, or a mixture of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from apr_dist.data.manifest import Manifest
from apr_dist.data.mixture import CYCLE_BATCHES, Mixture, Source
from apr_dist.errors import UsageError

TrainingSet = Manifest | Mixture


def open_training_set(dataset: Path | None, mixture: Mapping[str, float]) -> TrainingSet:
    """Open the folder, or every folder of the mixture.

    Args:
        dataset: folder of training shards; None with a mixture.
        mixture: weights by folder; empty without one.

    Raises:
        UsageError: both or neither were given, or a data set occurs twice.
        ManifestError, ShardError: a folder is not a whole data set.
    """
    if bool(mixture) == (dataset is not None):
        both = "both name training data" if mixture else "are both missing"
        raise UsageError(
            f"--dataset and --loader.mixture {both}",
            where="command line",
            expected="one of them",
            remedy="put the folder into the mixture with a weight" if mixture else "give --dataset FOLDER",
            falsifier="INV-TRAIN-010",
        )
    if dataset is not None:
        return Manifest.load(dataset)
    names = tail_names([Path(path) for path in mixture])
    return Mixture(
        tuple(
            Source(name, Manifest.load(Path(path)), weight)
            for name, (path, weight) in zip(names, mixture.items(), strict=True)
        )
    )


def parts_of(training: TrainingSet) -> tuple[Manifest, ...]:
    """The shard folders a training set consists of."""
    return (
        tuple(source.dataset for source in training.sources) if isinstance(training, Mixture) else (training,)
    )


def check_shares(training: TrainingSet, *, global_batch: int, block: int) -> None:
    """Every source of a mixture gets at least one unit of its order in a cycle of a thousand batches.

    Raises:
        UsageError: naming the source that would get none.
    """
    if isinstance(training, Mixture):
        training.units_per_cycle(cycle_units(global_batch, block))


def cycle_units(global_batch: int, block: int) -> int:
    """Units (sequences, or blocks of ``block`` of them) after which a mixture deals its shares again."""
    return -(-CYCLE_BATCHES * global_batch // block)


def tail_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart, so that moving all of them changes none.

    ``/data/code/train`` and ``/data/prose/train`` are ``code/train`` and ``prose/train``.
    """
    parts = [path.resolve().parts[1:] for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
