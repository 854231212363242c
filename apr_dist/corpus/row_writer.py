"""From encoded conversations to rows: what is too long is cut, what fits together shares a row.

Conversations lie in shards of the work folder already, flagged, one a document. They are read back in windows
of a quarter of a million, of which only places are held in memory; rows go to shards of whole rows. How
conversations are chosen for a row is in ``packing``.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apr_dist.corpus.packing import pack
from apr_dist.corpus.split_writer import SplitWriter
from apr_dist.data.flags import BEGINS, NOT_A_TARGET, are_begins, are_targets, padding
from apr_dist.data.manifest_file import Shard
from apr_dist.data.shard_files import FINGERPRINTS_SUFFIX, INDEX_SUFFIX

WITHOUT_TARGETS = "without targets"
_WINDOW = 1 << 18

Words = NDArray[np.uint32]


class TooLong(StrEnum):
    """What is done with a conversation that is longer than a row."""

    TRUNCATE = "truncate"
    """Its beginning is kept, as much as a row holds."""
    DROP = "drop"
    """It is left out."""
    SPLIT = "split"
    """It becomes pieces; each begins with the token the one before ends with, so no target is lost."""


_COUNTED = {TooLong.TRUNCATE: "truncated", TooLong.DROP: "dropped", TooLong.SPLIT: "split"}


@dataclass(frozen=True)
class RowSettings:
    """How rows are made.

    Attributes:
        seq_length: tokens of a row.
        too_long: what is done with longer conversations.
        packed: several conversations share a row; else each has its own.
        pad_id: the id of padding.
        shard_tokens: a shard closes after the row that reaches this many tokens.
        turn_end: the token that ends a turn, whose targets are counted; None if there is none.
    """

    seq_length: int
    too_long: TooLong
    packed: bool
    pad_id: int
    shard_tokens: int
    turn_end: int | None


@dataclass
class RowFacts:
    """What the rows of a split hold; see `data.manifest_file.Conversations` for each."""

    rows: int
    tokens: int
    targets: int
    turn_end_targets: int
    lengths: dict[str, int]
    counts: dict[str, int]


@dataclass(frozen=True)
class _Piece:
    """Words of one conversation that stay together: those from ``start`` to ``stop`` of its shard."""

    words: Words
    start: int
    stop: int
    fingerprint: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def read(self) -> Words:
        """Its words, the first marked as what begins it."""
        words = self.words[self.start : self.stop].copy()
        words[0] |= BEGINS | NOT_A_TARGET
        return words


def write_rows(
    staged: Path, shards: Sequence[Shard], folder: Path, settings: RowSettings
) -> tuple[list[Shard], RowFacts]:
    """Make rows of the conversations in ``shards`` of folder ``staged``, into shards of ``folder``.

    Returns:
        The shards, and what they hold.
    """
    writer = SplitWriter(folder, shard_tokens=sys.maxsize, flagged=True)
    rows = _Rows(writer, settings)
    sizes: list[NDArray[np.int64]] = []
    window: list[_Piece] = []
    for words, starts, fingerprints in _read(staged, shards):
        sizes.append(np.diff(starts))
        for number, fingerprint in enumerate(fingerprints.tolist()):
            window += rows.cut(words, int(starts[number]), int(starts[number + 1]), fingerprint)
            if len(window) >= _WINDOW:
                rows.write(window)
                window = []
    rows.write(window)
    rows.close_shard()
    return writer.shards, rows.facts(np.concatenate(sizes))


def _read(
    staged: Path, shards: Sequence[Shard]
) -> Iterator[tuple[Words, NDArray[np.int64], NDArray[np.uint64]]]:
    """Of each shard its words, where conversations begin and the last one ends, and their fingerprints."""
    for shard in shards:
        path = staged / shard.file
        words = np.memmap(path, dtype="<u4", mode="r")
        starts = np.append(np.fromfile(path.with_suffix(INDEX_SUFFIX), dtype="<u8"), np.uint64(words.size))
        yield words, starts.astype(np.int64), np.fromfile(path.with_suffix(FINGERPRINTS_SUFFIX), dtype="<u8")


class _Rows:
    """Rows under way into shards, and what is counted on the way."""

    def __init__(self, writer: SplitWriter, settings: RowSettings) -> None:
        self._writer, self._settings = writer, settings
        self._rows = self._tokens = self._targets = 0
        self._counts: Counter[str] = Counter()
        self._ends = 0

    def cut(self, words: Words, start: int, stop: int, fingerprint: int) -> list[_Piece]:
        """The conversation in the pieces that the policy makes of it; those without a target are left out.

        Where its turns were encoded one by one, each is cut by itself.
        """
        begins = start + np.flatnonzero(are_begins(words[start:stop]))
        ends = [*begins[1:].tolist(), stop]
        return [
            piece
            for first, last in zip(begins.tolist(), ends, strict=True)
            for piece in self._cut(words, first, last, fingerprint)
        ]

    def _cut(self, words: Words, start: int, stop: int, fingerprint: int) -> list[_Piece]:
        length, policy = self._settings.seq_length, self._settings.too_long
        pieces = [_Piece(words, start, stop, fingerprint)]
        if stop - start > length:
            self._counts[_COUNTED[policy]] += 1
            if policy is TooLong.DROP:
                return []
            # Neighbours share a token: the first of a piece cannot be its target, so the one before has it.
            step = length - 1 if policy is TooLong.SPLIT else stop
            firsts = range(start, stop - 1, step)
            pieces = [_Piece(words, first, min(first + length, stop), fingerprint) for first in firsts]
        kept = [piece for piece in pieces if bool(are_targets(words[piece.start + 1 : piece.stop]).any())]
        if not kept:
            self._counts[WITHOUT_TARGETS] += 1
        elif len(kept) < len(pieces):
            self._counts["pieces without targets"] += len(pieces) - len(kept)
        return kept

    def write(self, pieces: Sequence[_Piece]) -> None:
        """Rows of these pieces, and of no others."""
        length = self._settings.seq_length
        rows = [[number] for number in range(len(pieces))]
        if self._settings.packed:
            rows = pack([piece.size for piece in pieces], length)
        for row in rows:
            if self._writer.open_tokens >= self._settings.shard_tokens:
                self.close_shard()
            left = length
            for number in row:
                words = pieces[number].read()
                self._writer.append(words, pieces[number].fingerprint)
                self._count(words)
                left -= words.size
            if left:
                self._writer.append_end(padding(left, self._settings.pad_id))
            self._rows += 1

    def _count(self, words: Words) -> None:
        targets = are_targets(words)
        if self._settings.turn_end is not None:  # a target's word is its id
            self._ends += int(np.count_nonzero(words == self._settings.turn_end))
        self._tokens += words.size
        self._targets += int(np.count_nonzero(targets))

    def close_shard(self) -> None:
        """End the shard with the token that its last row's last input is followed by, which is no target."""
        if self._writer.open_tokens:
            self._writer.append_end(padding(1, self._settings.pad_id))
            self._writer.close_shard()

    def facts(self, sizes: NDArray[np.int64]) -> RowFacts:
        """What the rows hold, of conversations that had ``sizes`` tokens each."""
        places = {"least": 0.0, "quarter": 0.25, "median": 0.5, "three quarters": 0.75, "most": 1.0}
        found = np.quantile(sizes, list(places.values()), method="lower").tolist() if sizes.size else []
        return RowFacts(
            rows=self._rows,
            tokens=self._tokens,
            targets=self._targets,
            turn_end_targets=self._ends,
            lengths={name: int(size) for name, size in zip(places, found, strict=False)},
            counts={"conversations": int(sizes.size), **self._counts},
        )
