"""Mixtures: several data sets in fixed shares, as one training stream.

The stream is dealt out in cycles of a thousand global batches, each with the same whole number of
sequences of every source, spread evenly. So any thousand consecutive batches hold each source's share to
within one sequence, whatever the seed, the ranks or the place a run resumes at.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from apr_dist.errors import UsageError

if TYPE_CHECKING:
    from apr_dist.data.manifest import Manifest, Shard

CYCLE_BATCHES = 1_000


@dataclass(frozen=True)
class Source:
    """One data set of a mixture.

    Attributes:
        name: key of its order; part of the data contract, so renaming it reshuffles it.
        dataset: its shards.
        weight: its share, relative to the other weights.
    """

    name: str
    dataset: Manifest
    weight: float = 1.0


@dataclass(frozen=True)
class Progress:
    """How far a run has come in one data set.

    Attributes:
        sequences: handed out so far, over all ranks.
        epoch: whole passes over it done.
        newest_pass: number, from 0, of the pass that the last sequence handed out belongs to.
    """

    sequences: int
    epoch: int
    newest_pass: int


@dataclass(frozen=True)
class Mixture:
    """Data sets and their weights; the order in which they are listed does not matter.

    Raises:
        UsageError: no source, a name or data set that occurs twice, or a weight that is not positive.
    """

    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(sorted(self.sources, key=lambda source: source.name)))
        if not self.sources:
            raise UsageError("a mixture without sources", expected="at least one")
        for what, values in (
            ("name", [source.name for source in self.sources]),
            ("data set", [source.dataset.fingerprint for source in self.sources]),
        ):
            twice = {value for value in values if values.count(value) > 1}
            if twice:
                raise UsageError(
                    f"the mixture has the {what} {', '.join(sorted(twice))} twice",
                    expected="each once; a weight says how often it is drawn",
                )
        for source in self.sources:
            if not 0 < source.weight < float("inf"):
                raise UsageError(
                    f"source {source.name} has weight {source.weight}", expected="a positive number"
                )

    @property
    def folder(self) -> Path:
        """Where the first source lies; errors name it."""
        return self.sources[0].dataset.folder

    @property
    def shards(self) -> tuple[Shard, ...]:
        """All shards, source by source."""
        return tuple(shard for source in self.sources for shard in source.dataset.shards)

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex over names, weights and fingerprints: the mixture's identity in checkpoints."""
        lines = [f"{source.name} {source.weight!r} {source.dataset.fingerprint}" for source in self.sources]
        return hashlib.sha256("\n".join(["mixture", *lines]).encode()).hexdigest()

    def describe(self) -> list[dict[str, object]]:
        """Name, weight and fingerprint of every source, for checkpoints and verdicts."""
        return [
            {"name": source.name, "weight": source.weight, "fingerprint": source.dataset.fingerprint}
            for source in self.sources
        ]

    def units_per_cycle(self, cycle: int) -> list[int]:
        """Units of each source in a cycle of ``cycle``, by largest remainders: less than one off its share.

        Raises:
            UsageError: a source would get none.
        """
        weights = [Fraction(repr(float(source.weight))) for source in self.sources]
        shares = [weight / sum(weights) * cycle for weight in weights]
        units = [int(share) for share in shares]
        by_remainder = sorted(range(len(units)), key=lambda i: (units[i] - shares[i], i))
        for index in by_remainder[: cycle - sum(units)]:
            units[index] += 1
        for source, count in zip(self.sources, units, strict=True):
            if not count:
                raise UsageError(
                    f"source {source.name} with weight {source.weight} would get no sequence in "
                    f"{CYCLE_BATCHES:,} batches",
                    expected="a share of at least one",
                )
        return units


def sources_of(dataset: Manifest | Mixture, cycle: int) -> list[tuple[Manifest, int, int]]:
    """Per source of ``dataset``: its shards, the key of its order, and its units in a cycle of ``cycle``."""
    if not isinstance(dataset, Mixture):
        return [(dataset, 0, 1)]
    units = dataset.units_per_cycle(cycle)
    keys = [xxhash.xxh3_64_intdigest(source.name.encode()) for source in dataset.sources]
    return [
        (source.dataset, key, count) for source, key, count in zip(dataset.sources, keys, units, strict=True)
    ]
