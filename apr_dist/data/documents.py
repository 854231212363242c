"""Where documents begin inside packed sequences, for attention that must not cross them, and loss masks.

Lives here: facts about a batch that follow from document boundaries or token ids. Which rows a batch
has is ``loader``'s to say (``TokenLoader.documents``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from apr_dist.data.flags import BEGINS
from apr_dist.errors import DataError

if TYPE_CHECKING:
    from apr_dist.data.manifest import Manifest, Shard


@dataclass(frozen=True)
class Documents:
    """The documents of one micro-batch of inputs [batch, seq].

    A document cut off by the beginning of a row counts from there: attention cannot see further.

    Attributes:
        edges: int32 [documents + 1], where documents begin in the flattened batch, and its end. No document
            crosses rows.
        shape: (batch, seq).
    """

    edges: NDArray[np.int32]
    shape: tuple[int, int]

    @staticmethod
    def from_begins(begins: torch.Tensor) -> Documents:
        """From bool [batch, seq], true where a document begins; every row begins one."""
        begins = begins.clone()
        begins[:, :1] = True
        starts = begins.numpy().ravel().nonzero()[0].astype(np.int32)
        return Documents(np.append(starts, np.int32(begins.numel())), (begins.shape[0], begins.shape[1]))

    @staticmethod
    def of_flagged(rows: torch.Tensor) -> Documents:
        """The conversations of raw words [batch, seq + 1] of flagged shards (`flags`)."""
        return Documents.from_begins((rows[:, :-1] & BEGINS) != 0)

    def split(self, rows: int) -> list[Documents]:
        """Those of each part of ``rows`` rows of the batch."""
        (batch, length), parts = self.shape, []
        for first in range(0, batch, rows):
            count = min(rows, batch - first)
            low, high = self.edges.searchsorted((first * length, (first + count) * length))
            parts.append(Documents(self.edges[low : high + 1] - np.int32(first * length), (count, length)))
        return parts

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """``edges`` as a tensor: what variable-length attention kernels take."""
        return torch.from_numpy(self.edges)

    @cached_property
    def max_seqlen(self) -> int:
        """Tokens of the longest."""
        return int(np.diff(self.edges).max(initial=0))

    @cached_property
    def ids(self) -> torch.Tensor:
        """int32 [batch, seq], number of the document within its row, from 0."""
        starts, width = self.edges[:-1], max(self.shape[1], 1)
        # One number a document, repeated over its tokens: much cheaper than running sums over all of them.
        first = starts.searchsorted(starts // width * width).astype(np.int32)
        ids = np.repeat(np.arange(starts.size, dtype=np.int32) - first, np.diff(self.edges))
        return torch.from_numpy(ids).view(self.shape)

    @cached_property
    def positions(self) -> torch.Tensor:
        """int32 [batch, seq], place within the document, from 0."""
        places = np.arange(self.edges[-1], dtype=np.int32)
        return torch.from_numpy(places - np.repeat(self.edges[:-1], np.diff(self.edges))).view(self.shape)

    def attention_mask(self) -> torch.Tensor:
        """Bool [batch, 1, seq, seq], true where a query may look: causal, within one document."""
        same = self.ids[:, None, :, None] == self.ids[:, None, None, :]
        return same & torch.ones(same.shape[-2:], dtype=torch.bool).tril()


class DocumentStarts:
    """Where the documents of shards begin; the indexes that were read lately are kept.

    Args:
        max_bytes: of indexes that are kept; a shard of a million tokens has one of a few kilobytes.
    """

    def __init__(self, max_bytes: int = 64 << 20) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._kept: OrderedDict[tuple[Path, str], NDArray[np.int64]] = OrderedDict()

    def of(self, dataset: Manifest, shard: Shard) -> NDArray[np.int64]:
        """First token of each document of ``shard``: [documents], compared with its hash when it is read.

        Raises:
            ShardError: as ``Manifest.document_starts``.
        """
        key = (dataset.folder, shard.file)
        starts = self._kept.get(key)
        if starts is None:
            starts = dataset.document_starts(shard).astype(np.int64)
            self._kept[key] = starts
            self._bytes += starts.nbytes
            while self._bytes > self._max_bytes and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        else:
            self._kept.move_to_end(key)
        return starts


def document_begins(
    rows: Callable[[], torch.Tensor],
    places: Sequence[tuple[Manifest, Shard, int]],
    seq_length: int,
    known: DocumentStarts,
) -> torch.Tensor:
    """Bool [batch, seq], true where a document begins in the inputs of rows.

    From the flags of flagged shards, else from the data set's document index where it has one, else behind
    every end-of-document id: the mark belongs to the document it ends.

    Args:
        rows: gives [batch, seq + 1] token ids; asked for only where there is no index.
        places: per row its data set, its shard, and its first token in the shard.
        seq_length: inputs of a row.
        known: the indexes.

    Raises:
        DataError: a data set records neither.
    """
    found = [np.zeros(0, dtype=np.int64)]
    marked: dict[int, int] = {}
    flagged: list[int] = []
    for number, (dataset, shard, start) in enumerate(places):
        if dataset.flagged:
            flagged.append(number)
        elif dataset.has_index:
            starts = known.of(dataset, shard)
            low, high = starts.searchsorted((start, start + seq_length))
            found.append(starts[low:high] + (number * seq_length - start))
        elif dataset.eos_token_id is not None:
            marked[number] = dataset.eos_token_id
        else:
            raise DataError(
                "this data set records neither document starts nor an end-of-document id",
                where=dataset.folder,
                expected="boundaries to tell documents apart by",
                remedy="encode the corpus again with `apr-dist tokenize encode-corpus`",
            )
    flat = np.zeros(len(places) * seq_length, dtype=np.bool_)
    flat[np.concatenate(found)] = True
    begins = torch.from_numpy(flat).view(len(places), seq_length)
    if marked or flagged:
        ids = rows()
        begins[flagged] = (ids[flagged, :-1] & BEGINS) != 0
        for number, end in marked.items():
            begins[number, 1:] = ids[number, :-2] == end
    return begins


def loss_mask(targets: torch.Tensor, *, ignored_ids: Sequence[int]) -> torch.Tensor:
    """Bool like ``targets``, false where the loss must not count: padding, or any ids you name."""
    counts = torch.ones_like(targets, dtype=torch.bool)
    for ignored in ignored_ids:  # a tensor of them would be a copy to the device that the host waits for
        counts &= targets != ignored
    return counts
