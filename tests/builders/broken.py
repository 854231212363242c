"""A model that breaks at one token: its loss is no number where that token is read, and one elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from apr_dist.apr.reader import AprReader
from apr_dist.data.loader import EvaluationLoader, TokenLoader
from apr_dist.data.manifest import Manifest
from builders.files import write_apr

if TYPE_CHECKING:
    from builders.runs import Inputs

AMPLIFIED = 1e19
"""What queries and keys multiply the one channel by: their product overflows, no gradient does."""


def token_of_one_sequence(inputs: Inputs, *, batch: int, evaluated: int) -> tuple[int, int]:
    """A token that one sequence of one global batch reads; and that sequence's place in the batch.

    No other sequence of that batch, none of an earlier one and no held-out one reads it.

    Args:
        inputs: whose shards are looked at, in batches of four sequences of 32 tokens.
        batch: number of the global batch, from 0.
        evaluated: held-out sequences that count.

    Raises:
        LookupError: there is no such token.
    """
    loader = TokenLoader(
        Manifest.load(inputs.train), seq_length=32, global_batch=4, micro_batch=4, seed=42, max_epochs=None
    )
    batches = [torch.cat(loader.batch(number))[:, :-1] for number in range(batch + 1)]
    loader.close()
    held_out = EvaluationLoader(
        Manifest.load(inputs.validation), seq_length=32, micro_batch=4, max_sequences=evaluated
    )
    seen = set(torch.cat([*held_out]).flatten().tolist())
    held_out.close()
    *earlier, rows = batches
    for one in earlier:
        seen |= set(one.flatten().tolist())
    for number, row in enumerate(rows):
        others = set(torch.cat([rows[:number], rows[number + 1 :]]).flatten().tolist())
        for token in row.tolist():
            if token not in others and token not in seen:
                return token, number
    raise LookupError("every token of the batch is read by another sequence too")


def write_model_that_breaks_at(token: int, inputs: Inputs, path: Path) -> Path:
    """The pretrained model with a channel that is zero but for one token, which attention overflows at."""
    with AprReader(inputs.pretrained) as reader:
        tensors = {name: reader.float32(name).copy() for name in reader.tensors}
        metadata = reader.metadata.to_mapping()
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:, 5] = 0.0
    embedding[token, 5] = 1.0
    for projection in ("q_proj", "k_proj"):
        tensors[f"model.layers.0.self_attn.{projection}.weight"][:, 5] = AMPLIFIED
    return write_apr(path, tensors, metadata)
