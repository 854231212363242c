"""Where documents begin inside packed sequences, for attention that must not cross them, and loss masks.

Lives here: facts about a batch that follow from document boundaries or token ids. Which rows a batch
has is ``loader``'s to say (``TokenLoader.documents``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from apr_dist.errors import DataError

if TYPE_CHECKING:
    from apr_dist.data.manifest import Manifest, Shard


@dataclass(frozen=True)
class Documents:
    """The documents of one micro-batch of inputs [batch, seq].

    A document cut off by the beginning of a row counts from there: attention cannot see further.

    Attributes:
        ids: int32 [batch, seq], number of the document within its row, from 0.
        positions: int32 [batch, seq], place within the document, from 0.
        cu_seqlens: int32 [documents + 1], where documents begin in the flattened batch, and its end: what
            variable-length attention kernels take. No document crosses rows.
        max_seqlen: tokens of the longest.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int

    @staticmethod
    def from_begins(begins: torch.Tensor) -> Documents:
        """From bool [batch, seq], true where a document begins; every row begins one."""
        begins = begins.clone()
        begins[:, 0] = True
        place = torch.arange(begins.shape[1], dtype=torch.int32).expand(begins.shape)
        since = torch.where(begins, place, 0).cummax(dim=1).values
        starts = begins.flatten().nonzero().flatten().to(torch.int32)
        cu_seqlens = torch.cat([starts, torch.tensor([begins.numel()], dtype=torch.int32)])
        return Documents(
            ids=begins.cumsum(dim=1, dtype=torch.int32) - 1,
            positions=(place - since).to(torch.int32),
            cu_seqlens=cu_seqlens,
            max_seqlen=int(cu_seqlens.diff().max()) if starts.numel() else 0,
        )

    def attention_mask(self) -> torch.Tensor:
        """Bool [batch, 1, seq, seq], true where a query may look: causal, within one document."""
        same = self.ids[:, None, :, None] == self.ids[:, None, None, :]
        return same & torch.ones(same.shape[-2:], dtype=torch.bool).tril()


def document_begins(rows: torch.Tensor, places: Sequence[tuple[Manifest, Shard, int]]) -> torch.Tensor:
    """Bool [batch, seq], true where a document begins in the inputs of ``rows``.

    From the data set's document index where it has one, else behind every end-of-document id: the mark
    belongs to the document it ends.

    Args:
        rows: [batch, seq + 1] token ids.
        places: per row its data set, its shard, and its first token in the shard.

    Raises:
        DataError: a data set records neither.
    """
    begins = torch.zeros((rows.shape[0], rows.shape[1] - 1), dtype=torch.bool)
    for begin, row, (dataset, shard, start) in zip(begins, rows, places, strict=True):
        if dataset.has_index:
            starts = dataset.document_starts(shard)
            low, high = starts.searchsorted([start, start + begin.numel()])
            begin[torch.from_numpy((starts[low:high] - start).astype("int64"))] = True
        elif dataset.eos_token_id is not None:
            begin[1:] = row[:-2] == dataset.eos_token_id
        else:
            raise DataError(
                "this data set records neither document starts nor an end-of-document id",
                where=dataset.folder,
                expected="boundaries to tell documents apart by",
                remedy="encode the corpus again with `apr-dist tokenize encode-corpus`",
            )
    return begins


def loss_mask(targets: torch.Tensor, *, ignored_ids: Sequence[int]) -> torch.Tensor:
    """Bool like ``targets``, false where the loss must not count: padding, or any ids you name."""
    counts = torch.ones_like(targets, dtype=torch.bool)
    for ignored in ignored_ids:  # a tensor of them would be a copy to the device that the host waits for
        counts &= targets != ignored
    return counts
