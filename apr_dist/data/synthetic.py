"""Made-up tokens, for trying a machine without data; a run on them says so on every line."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from apr_dist.data.documents import Documents
from apr_dist.data.mixture import Progress


class SyntheticTokens:
    """Uniform random token ids: global batch k is a pure function of (seed, k).

    Args:
        vocab_size: ids are drawn below this.
        seq_length: tokens per sequence; a row holds one more.
        batch_size: sequences per global batch.
        micro_batch: sequences per yielded tensor.
        rank: this process.
        world_size: processes that share a global batch.
        seed: of the stream.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        seq_length: int,
        batch_size: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        self._vocab_size, self._row = vocab_size, seq_length + 1
        self._batch_size, self._micro = batch_size, micro_batch
        self._rank, self._world_size, self._seed = rank, world_size, seed

    flagged = False
    fingerprint = "synthetic"

    def progress(self, batches: int) -> dict[str, Progress]:
        """How far the one source has come when ``batches`` global batches were handed out."""
        return {"synthetic": Progress(batches * self._batch_size, 0, 0)}

    def documents(self, k: int, *, plain: bool = True) -> list[Documents]:  # noqa: ARG002
        """Made-up sequences are one document each."""
        begins = [torch.zeros(rows.shape[0], rows.shape[1] - 1, dtype=torch.bool) for rows in self.batch(k)]
        return [Documents.from_begins(begin) for begin in begins]

    def batch(self, k: int) -> list[torch.Tensor]:
        """This rank's micro-batches of global batch ``k``, each int32 [micro_batch, seq + 1]."""
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + k) % 2**63)
        rows = torch.randint(
            self._vocab_size, (self._batch_size, self._row), generator=generator, dtype=torch.int32
        )
        share = rows.shape[0] // self._world_size
        return list(torch.split(rows[self._rank * share : (self._rank + 1) * share], self._micro))


class SyntheticEvaluation:
    """A fixed pair of global batches that training never draws, re-iterable."""

    flagged = False
    fingerprint = "synthetic"

    def __init__(self, tokens: SyntheticTokens) -> None:
        self._batches = [piece for k in (2**40, 2**40 + 1) for piece in tokens.batch(k)]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)
