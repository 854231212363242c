"""Two flags inside a shard's u32 words: which token is not a target, and where a conversation begins.

The token id is in the low 30 bits. Padding is a span of its own: its first word begins it, no word of it is a
target. So a row of raw words says everything a batch needs, and views stay views. A shard without flags has
ids below 2^30 in its words, which reads the same: every token is a target, and nothing begins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

NOT_A_TARGET: Final = 1 << 31
"""The loss does not count this token where it is predicted."""
BEGINS: Final = 1 << 30
"""A conversation, or padding, begins with this token: it sees nothing before itself."""
ID_MASK: Final = BEGINS - 1
VOCABULARY_LIMIT: Final = BEGINS
"""Ids of a flagged shard are below this."""


def flag(ids: NDArray[np.uint32], is_target: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """The words of one conversation: [tokens] u32. Its first token is never a target: nothing predicts it."""
    words = ids | (~is_target * ids.dtype.type(NOT_A_TARGET))
    words[:1] |= NOT_A_TARGET | BEGINS
    return words


def padding(count: int, pad_id: int) -> NDArray[np.uint32]:
    """``count`` words of padding: a span of its own without a target."""
    import numpy as np  # noqa: PLC0415  (the constants do not need it)

    return flag(np.full(count, pad_id, dtype=np.uint32), np.zeros(count, dtype=np.bool_))


def ids_of(words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Token ids: [tokens] u32."""
    ids: NDArray[np.uint32] = words & words.dtype.type(ID_MASK)
    return ids


def are_targets(words: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Which tokens the loss counts: bool [tokens]."""
    targets: NDArray[np.bool_] = words < NOT_A_TARGET
    return targets


def are_begins(words: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Where conversations and padding begin: bool [tokens]."""
    begins: NDArray[np.bool_] = (words & words.dtype.type(BEGINS)) != 0
    return begins


def input_ids(rows: torch.Tensor) -> torch.Tensor:
    """Token ids of raw words in int32 or int64, on any device."""
    return rows & ID_MASK


def not_targets(rows: torch.Tensor) -> torch.Tensor:
    """Bool like raw words in int32 or int64, true where a token is not a target."""
    return (rows >> 31) != 0  # -1 of int32, whose sign the flag is; 1 of int64
