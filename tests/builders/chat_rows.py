"""Folders of flagged rows with known conversations: made-up ids, or a whole corpus of made-up text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from apr_dist.corpus.row_writer import RowSettings, TooLong, write_rows
from apr_dist.corpus.split_writer import SplitWriter
from apr_dist.data.flags import flag
from apr_dist.data.manifest import Manifest
from apr_dist.data.manifest_file import Conversations, TokenizerIdentity

PAD, END = 0, 5
"""Ids of padding, and of what ends a turn."""


@dataclass(frozen=True)
class Turns:
    """One conversation: its ids, and which of them are targets."""

    ids: NDArray[np.uint32]
    is_target: NDArray[np.bool_]


def made_up(count: int, *, vocab_size: int, longest: int, seed: int = 0, shortest: int = 2) -> list[Turns]:
    """Conversations of random ids; about half of the tokens of each are targets, at least one is."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        size = draw.randint(shortest, longest)
        ids = np.array([draw.randrange(1, vocab_size) for _ in range(size)], dtype=np.uint32)
        is_target = np.array([False] + [draw.random() < 0.5 for _ in range(size - 1)])
        is_target[draw.randrange(1, size)] = True
        found.append(Turns(ids, is_target))
    return found


def build_rows(
    folder: Path,
    turns: Sequence[Turns],
    seq_length: int,
    *,
    vocab_size: int,
    packed: bool = True,
    too_long: TooLong = TooLong.TRUNCATE,
    shard_tokens: int = 1_000_000,
    **facts: Any,
) -> Manifest:
    """A folder of the rows that the encoder makes of these conversations, with its manifest.

    Args:
        folder: made here.
        turns: the conversations.
        seq_length: tokens of a row.
        vocab_size: ids are below it.
        packed: several share a row.
        too_long: what becomes of longer ones.
        shard_tokens: a shard closes after the row that reaches as many.
        facts: other fields of the manifest, or of its description of conversations.
    """
    staged = folder.with_name(folder.name + ".staged")
    for one in (staged, folder):
        one.mkdir(parents=True, exist_ok=True)
    writer = SplitWriter(staged, shard_tokens=shard_tokens, flagged=True)
    for one in turns:
        writer.append(flag(one.ids, one.is_target), xxhash.xxh3_64_intdigest(one.ids.tobytes()))
    writer.close_shard()
    settings = RowSettings(
        seq_length=seq_length,
        too_long=too_long,
        packed=packed,
        pad_id=PAD,
        shard_tokens=shard_tokens,
        turn_end=facts.get("turn_end", END),
    )
    shards, made = write_rows(staged, writer.shards, folder, settings)
    described = {
        "seq_length": seq_length,
        "train_on": "assistant",
        "template": "sha256:" + "0" * 64,
        "turn_end": settings.turn_end,
        "packing": "best-fit" if packed else "none",
        "too_long": too_long.value,
        "pad_id": PAD,
        **asdict(made),
    }
    described |= {key: facts.pop(key) for key in set(described) & set(facts)}
    Manifest(
        folder=folder,
        shards=tuple(shards),
        vocab_size=vocab_size,
        tokenizer=facts.pop("tokenizer", None) or TokenizerIdentity("a" * 64, vocab_size, 0, vocab_size, 0),
        total_documents=sum(shard.documents or 0 for shard in shards),
        eos_policy="none",
        has_index=True,
        conversations=Conversations(**described),
        **facts,
    ).write()
    return Manifest.load(folder)
