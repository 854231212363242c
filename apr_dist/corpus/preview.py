"""Conversations of flagged shards as text, with what is trained on told apart."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apr_dist.data.flags import are_begins, are_targets, ids_of
from apr_dist.data.manifest import Manifest
from apr_dist.errors import DataError, UsageError

Decode = Callable[[Sequence[int]], str]
"""Ids to text, special tokens included."""

_OPEN, _CLOSE = "[[", "]]"


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens that are all trained on, or all not."""

    text: str
    trained: bool


@dataclass(frozen=True)
class ShownConversation:
    """One conversation as it lies in a row.

    Attributes:
        number: counted from 0 over the whole folder.
        shard: the file it lies in.
        first_token: where it begins in that shard.
        tokens: its length.
        targets: how many of them are trained on.
        stretches: its text.
    """

    number: int
    shard: str
    first_token: int
    tokens: int
    targets: int
    stretches: tuple[Stretch, ...]

    def marked(self) -> str:
        """The text, with what is trained on between ``[[`` and ``]]``."""
        return "".join(f"{_OPEN}{one.text}{_CLOSE}" if one.trained else one.text for one in self.stretches)


def preview_conversations(folder: Path, decode: Decode, *, count: int) -> Iterator[ShownConversation]:
    """Conversations spread evenly over a folder of flagged shards, ``count`` of them or all there are.

    Raises:
        ManifestError, ShardError: the folder cannot be opened or read.
        DataError: its words carry no flags.
        UsageError: ``count`` is below 1.
    """
    if count < 1:
        raise UsageError(f"--count is {count}", expected="at least 1")
    manifest = Manifest.load(folder)
    if not manifest.flagged:
        raise DataError(
            "it holds plain text, all of which is trained on",
            where=folder,
            expected="conversations, as `apr-dist tokenize encode-chat` writes them",
            remedy=f"to see its text: apr-dist tokenize decode {folder}",
        )
    total = sum(shard.documents or 0 for shard in manifest.shards)
    wanted = np.unique(np.linspace(0, max(total - 1, 0), min(count, total)).round().astype(np.int64))
    number = 0
    for shard in manifest.shards:
        starts = manifest.document_starts(shard).astype(np.int64)
        words = np.memmap(manifest.path_of(shard), dtype="<u4", mode="r", shape=(shard.tokens,))
        for place in (wanted[(wanted >= number) & (wanted < number + starts.size)] - number).tolist():
            own = span_at(words, int(starts[place]))
            yield ShownConversation(
                number=number + place,
                shard=shard.file,
                first_token=int(starts[place]),
                tokens=own.size,
                targets=int(np.count_nonzero(are_targets(own))),
                stretches=tuple(_stretches(own, decode)),
            )
        number += starts.size


def span_at(words: NDArray[np.uint32], start: int) -> NDArray[np.uint32]:
    """The words from ``start`` to where the next conversation, or padding, begins."""
    step = 1 << 12
    for first in range(start + 1, words.size, step):
        begins = np.flatnonzero(are_begins(words[first : first + step]))
        if begins.size:
            return words[start : first + int(begins[0])]
    return words[start:]


def _stretches(words: NDArray[np.uint32], decode: Decode) -> Iterator[Stretch]:
    trained = are_targets(words)
    edges = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), words.size]
    for first, last in itertools.pairwise(edges):
        yield Stretch(decode(ids_of(words[first:last]).tolist()), bool(trained[first]))
