"""Where the documents packed into a batch begin; who computes attention within them is in ``kernels``."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Boundaries:
    """Where the documents of a batch begin, on its device: known beforehand, it needs no waiting to learn.

    Attributes:
        edges: int32 ``[documents + 1]``, first token of each document in the flattened batch, and its end;
            no document crosses rows.
        shape: ``(batch, seq)``.
    """

    edges: Tensor
    shape: tuple[int, int]

    @staticmethod
    def from_ids(document_ids: Tensor) -> Boundaries:
        """From integers ``[batch, seq]``, a new document where the id changes; waits for their device."""
        batch, length = document_ids.shape
        begins = torch.ones_like(document_ids, dtype=torch.bool)
        begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        starts = begins.flatten().nonzero().flatten()
        end = starts.new_full((1,), batch * length)
        return Boundaries(torch.cat((starts, end)).int(), (batch, length))

    @staticmethod
    def of_rows(batch: int, length: int, device: torch.device) -> Boundaries:
        """Every row is one document."""
        edges = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
        return Boundaries(edges, (batch, length))

    def positions(self) -> Tensor:
        """Place of each token within its document, int64 ``[batch, seq]``; nothing waits for the device."""
        places, document = self._documents()
        return (places - self.edges[document]).long().view(self.shape)

    def lengths(self) -> Tensor:
        """Tokens of the document that each token is of, int64 ``[batch, seq]``; nothing waits either."""
        _, document = self._documents()
        return (self.edges[document + 1] - self.edges[document]).long().view(self.shape)

    def _documents(self) -> tuple[Tensor, Tensor]:
        """Places of all tokens in the flattened batch, and the document of each."""
        batch, length = self.shape
        places = torch.arange(batch * length, dtype=torch.int32, device=self.edges.device)
        return places, torch.searchsorted(self.edges, places, right=True) - 1

    def row(self, index: int) -> Boundaries:
        """Those of one row, as a batch of one; waits for the device."""
        length = self.shape[1]
        edges = self.edges - index * length
        return Boundaries(edges[(edges >= 0) & (edges <= length)], (1, length))

    def spans(self) -> tuple[tuple[int, int, int], ...]:
        """``(row, start, stop)`` of each document; waits for the device."""
        length = self.shape[1]
        edges = itertools.pairwise(self.edges.tolist())
        return tuple((a // length, a % length, a % length + b - a) for a, b in edges)
