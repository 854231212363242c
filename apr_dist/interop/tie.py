"""Whether the model of a source has a head of its own: its tensors, its configuration, and ``--tie``."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apr_dist.gates.architecture import EMBEDDING, HEAD, HeadFacts, check_tie

CLAIM = "tie_word_embeddings"


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
    names: Collection[str],
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
    """
    stored, embedded = HEAD in names, EMBEDDING in names
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
