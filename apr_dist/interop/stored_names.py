"""Which of a source's tensors belong to the model, and under which name.

Prefixes and buffers are left behind, and a head that is the embedding is stored once: decided by tensors,
configuration and ``--tie``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from apr_dist.errors import UsageError, WeightsRefused
from apr_dist.gates.architecture import EMBEDDING, HEAD, HeadFacts, check_tie
from apr_dist.gates.names import ROTARY_BUFFER, plain_names

CLAIM: Final = "tie_word_embeddings"

_ROUNDING = 0.01  # of a buffer that was rounded to bfloat16


def model_tensors(
    stored: Iterable[str],
    *,
    rope_theta: float | None,
    values: Callable[[str], npt.NDArray[np.float32]],
    claimed: Any,
    asked: bool | None,
    equal: Callable[[str, str], bool],
    where: Path,
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The stored name of each of the model's own tensors by its plain name, and notes on what was changed.

    Args:
        stored: names as they are stored.
        rope_theta: base of the rotary frequencies, where it is known.
        values: reads a stored tensor.
        claimed: as ``decide_tie``.
        asked: as ``decide_tie``.
        equal: compares two stored tensors.
        where: what a refusal names.

    Raises:
        WeightsRefused: a rotary buffer holds other frequencies than ``rope_theta`` gives.
        ArchitectureRefused, UsageError: as ``decide_tie``.
    """
    names, notes = _plain(stored, rope_theta, values, where)
    decided = decide_tie(
        names,
        claimed=claimed,
        asked=asked,
        equal=lambda: equal(names[HEAD], names[EMBEDDING]),
        where=where,
    )
    if decided.tied and HEAD in names:
        head = names.pop(HEAD)
        names |= {EMBEDDING: head} if decided.renamed else {}
    return names, (*notes, *decided.notes)


def _plain(
    stored: Iterable[str],
    rope_theta: float | None,
    values: Callable[[str], npt.NDArray[np.float32]],
    where: Path,
) -> tuple[dict[str, str], list[str]]:
    plain = plain_names(stored)
    notes: list[str] = []
    renamed = [name for name, new in plain.items() if name != new]
    if renamed:
        notes.append(f"{len(renamed)} tensor names lost a prefix: {renamed[0]} is now {plain[renamed[0]]}")
    buffers = [name for name in plain if name.endswith(ROTARY_BUFFER)]
    for name in buffers:
        _check_frequencies(name, values(name), rope_theta, where)
        del plain[name]
    if buffers:
        notes.append(f"{len(buffers)} rotary_emb.inv_freq buffers were left out: rope_theta gives the same")
    return {new: old for old, new in plain.items()}, notes


def _check_frequencies(
    name: str, stored: npt.NDArray[np.float32], rope_theta: float | None, where: Path
) -> None:
    if not isinstance(rope_theta, int | float) or rope_theta <= 0:
        return  # the gate of the dimensions refuses it, in its own words
    exponents = np.arange(stored.size, dtype=np.float64) / max(1, stored.size)
    expected = float(rope_theta) ** -exponents
    if stored.ndim != 1 or not np.allclose(stored, expected, rtol=_ROUNDING, atol=1e-6):
        raise WeightsRefused(
            f"{name} holds other frequencies than rope_theta {rope_theta:g} gives",
            where=where,
            expected="a buffer that can be computed again",
            remedy="correct rope_theta in the configuration, or remove the buffer",
        )


@dataclass(frozen=True)
class Tie:
    """How an import treats the head.

    Attributes:
        tied: whether head and embedding are one parameter.
        renamed: the shared matrix is stored as the head alone and becomes the embedding.
        notes: what was decided and is worth reporting.
    """

    tied: bool
    renamed: bool = False
    notes: tuple[str, ...] = ()


def decide_tie(
    names: Collection[str | None],
    *,
    claimed: Any,
    asked: bool | None,
    equal: Callable[[], bool],
    where: Path,
) -> Tie:
    """Whether the head is the embedding, as asked, configured, and stored.

    A matrix that both share may be stored once under either name, as ``transformers`` loads it.

    Args:
        names: plain names of the tensors that are stored.
        claimed: ``tie_word_embeddings`` of the configuration; None where it is silent.
        asked: what the user asked for; None follows configuration and tensors.
        equal: compares the stored head with the stored embedding.
        where: what a refusal names.

    Raises:
        ArchitectureRefused: configuration and tensors disagree, or the claim is neither true nor false.
        UsageError: a head that is not there is to be kept apart.
    """
    stored, embedded = HEAD in names, EMBEDDING in names
    if asked is False and not stored:
        raise UsageError(
            f"the head cannot be kept apart: there is no {HEAD}", where=where, remedy="leave the option out"
        )
    same = equal() if stored and embedded and asked is None and claimed is not False else None
    facts = HeadFacts(present=stored, equals_embedding=same)
    tied = check_tie(claimed if asked is None else asked, facts, where=where)
    if not (tied and stored):
        return Tie(tied)
    if not embedded:
        note = f"{HEAD} is the only copy of the matrix that the embedding shares: stored as {EMBEDDING}"
        return Tie(tied, renamed=True, notes=(note,))
    why = "was dropped: the head is tied to the embedding as asked"
    return Tie(
        tied, notes=(f"{HEAD} {why if asked else 'equals the embedding and was dropped: it is tied'}",)
    )
