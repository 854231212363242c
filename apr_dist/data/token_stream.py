"""What both loaders stand on: the Rust stream over a data set, opened once per process, and its choices.

Lives here: ``Shuffle``, ``ShardStream`` and the checks of what a caller asked for. Which positions a
rank reads is decided in ``loader`` and ``evaluation_loader``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from apr_dist._rust_loader import TokenStream
from apr_dist.choices import VerifyShards
from apr_dist.data.descriptors import verified_marks
from apr_dist.data.mixture import Mixture, sources_of
from apr_dist.errors import DataError, ManifestError, UsageError

if TYPE_CHECKING:
    from apr_dist.data.manifest import Manifest, Shard

SETTLE_S = 2.0
"""A shard changed later than this before it was verified is verified again by the next process."""

_Choice = TypeVar("_Choice", bound=StrEnum)


class Shuffle(StrEnum):
    """In which order an epoch runs through its sequences."""

    SEQUENCE = "sequence"
    """Any sequence after any other; a batch is one copy."""
    BLOCK = "block"
    """Blocks of consecutive sequences in any order; a micro-batch is a view of the mapped shard."""
    NONE = "none"
    """As they lie in the shards, once."""


class ShardStream:
    """A ``TokenStream`` that is opened when used, and again in a forked or unpickled process.

    A fork may catch another thread of the parent inside the Rust core, so a child never uses the
    parent's.

    Args:
        dataset: the shards.
        cycle: units of a mixture's cycle.
        options: of ``TokenStream``.
    """

    def __init__(self, dataset: Manifest | Mixture, options: dict[str, Any], *, cycle: int = 1) -> None:
        if options["seq_length"] < 1 or options.get("max_open", 1) < 1:
            raise UsageError(
                f"seq_length {options['seq_length']}, max_open_shards {options.get('max_open', 1)}",
                expected="at least 1 of each",
            )
        self.sources = sources_of(dataset, cycle)
        for source, _, _ in self.sources:
            _check_size(source, options["seq_length"] * options.get("block", 1) + 1)
            source.check_rows(options["seq_length"])
        self._arguments = (dataset, options, cycle)
        self._opened: TokenStream | None = None
        self._process = os.getpid()
        self.open()

    def open(self) -> TokenStream:
        """The stream of this process."""
        if self._opened is None or self._process != os.getpid():
            marks = verified_marks() if self._arguments[1].get("verify") == VerifyShards.FIRST_TOUCH else None
            sources = [(data.folder, data.table, key, units) for data, key, units in self.sources]
            options = {"verified": marks, "settle_s": SETTLE_S, **self._arguments[1]}
            self._opened, self._process = TokenStream(sources, **options), os.getpid()
        return self._opened

    def sequences(self) -> int:
        """Sequences of all sources together."""
        return sum(self.open().sequences(source) for source in range(len(self.sources)))

    def shard(self, index: int) -> tuple[Manifest, Shard]:
        """The data set and the shard that ``TokenStream.locate`` gives the number of."""
        for source, _, _ in self.sources:
            if index < source.shard_count:
                return source, source.shards[index]
            index -= source.shard_count
        raise IndexError(index)

    def close(self) -> None:
        """Let go of the shards until the next use."""
        self._opened = None

    def __reduce__(self) -> tuple[Callable[..., ShardStream], tuple[Manifest | Mixture, dict[str, Any], int]]:
        return _reopened, self._arguments


def _reopened(dataset: Manifest | Mixture, options: dict[str, Any], cycle: int) -> ShardStream:
    return ShardStream(dataset, options, cycle=cycle)


def share_of(global_batch: int, micro_batch: int, rank: int, world_size: int) -> int:
    """Sequences of a global batch that each rank owns; UsageError when it does not divide."""
    if min(global_batch, micro_batch, world_size) < 1 or not 0 <= rank < world_size:
        raise UsageError(
            f"global_batch {global_batch}, micro_batch {micro_batch}, rank {rank} of world_size {world_size}",
            expected="positive sizes and a rank below the world size",
        )
    if global_batch % (world_size * micro_batch):
        raise UsageError(
            f"global_batch {global_batch} does not divide into world_size {world_size} "
            f"x micro_batch {micro_batch}",
            expected=f"a multiple of {world_size * micro_batch}",
            remedy="change one of the three",
        )
    return global_batch // world_size


def check_seed(seed: int) -> None:
    """Refuse a seed that the key of the order cannot hold."""
    if not 0 <= seed < 2**64:
        raise UsageError(f"seed is {seed}", expected="a number from 0 to 2^64 - 1")


def choice(kind: type[_Choice], value: str, name: str) -> _Choice:
    """``value`` as a member of ``kind``; UsageError with the valid names otherwise."""
    try:
        return kind(value)
    except ValueError as error:
        raise UsageError(f"{name} is {value!r}", expected=f"one of {', '.join(kind)}") from error


def _check_size(dataset: Manifest, needed: int) -> None:
    if not dataset.shard_count:
        raise ManifestError("it holds no shards", where=dataset.folder, expected="at least one shard")
    longest = dataset.longest_shard
    if longest < needed:
        raise DataError(
            f"the longest shard holds {longest} tokens",
            where=dataset.folder,
            expected=f"at least {needed} for one sequence or block of them",
            remedy="shorten the sequence, or encode the corpus into larger shards",
        )


def check_order(shuffle: Shuffle, block: int, micro_batch: int, *, mixed: bool, dtype: torch.dtype) -> None:
    """Whether batches can be read in this order.

    Args:
        shuffle: the order.
        block: sequences of a block.
        micro_batch: sequences per tensor.
        mixed: whether the data are a mixture.
        dtype: of batches.

    Raises:
        UsageError: naming what does not go with the order.
    """
    if block < 1 or (shuffle is Shuffle.BLOCK and block % micro_batch):
        raise UsageError(
            f"micro_batch {micro_batch} does not divide block_sequences {block}",
            expected="blocks that are cut into whole micro-batches",
            remedy="choose a multiple of the micro-batch, or shuffle=sequence",
        )
    if shuffle is Shuffle.NONE and mixed:
        raise UsageError("a mixture cannot be read unshuffled", expected="shuffle=sequence or block")
    allowed = (torch.int32,) if shuffle is Shuffle.BLOCK else (torch.int32, torch.int64)
    if dtype not in allowed:
        names = " or ".join(str(one).removeprefix("torch.") for one in allowed)
        raise UsageError(f"dtype is {dtype} with shuffle={shuffle}", expected=names)


def check_pinning(pin_memory: bool | None) -> None:
    """Whether memory can be page-locked as asked.

    Raises:
        UsageError: there is no device that would copy from it.
    """
    if pin_memory and not torch.cuda.is_available():
        raise UsageError(
            "pin_memory is true and there is no CUDA device",
            expected="page-locked memory only where a device copies from it",
            remedy="leave pin_memory to its default, which pins where a CUDA device is",
        )
