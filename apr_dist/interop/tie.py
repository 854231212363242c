"""Whether the model of a source has a head of its own: its tensors, its configuration, and ``--tie``."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apr_dist.errors import ArchitectureRefused
from apr_dist.gates.architecture import EMBEDDING, HEAD

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
    if claimed is not None and not isinstance(claimed, bool):
        raise _refused(f"{CLAIM} is {claimed!r}", "true or false", f"set {CLAIM} to true or false", where)
    wanted = claimed if asked is None else asked
    if HEAD not in names:
        if wanted is False:
            raise _refused(
                f"the head is said to be its own ({CLAIM} false) but there is no {HEAD}",
                "a separate head, or a tied one",
                "get a complete copy of the model; if its head is the embedding, import with --tie",
                where,
            )
        return Tie(tied=True)
    if EMBEDDING not in names:
        note = f"{HEAD} is the only copy of the matrix that the embedding shares: stored as {EMBEDDING}"
        return Tie(tied=True, renamed=True, notes=(note,)) if wanted else Tie(tied=False)
    if asked is not None:
        return Tie(asked, notes=(f"{HEAD} was dropped: the head is tied to the embedding as asked",) * asked)
    if claimed and not equal():
        raise _refused(
            f"the configuration ties the head to the embedding, but {HEAD} holds other values",
            "one or the other",
            f"drop the separate head with --tie, or set {CLAIM} to false",
            where,
        )
    if claimed:
        return Tie(True, notes=(f"{HEAD} equals the embedding and was dropped: the head is tied",))
    return Tie(False)


def _refused(what: str, expected: str, remedy: str, where: Path) -> ArchitectureRefused:
    return ArchitectureRefused(what, where=where, expected=expected, remedy=remedy)
