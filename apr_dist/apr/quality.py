"""How much a file says about itself, and how much of it is true: a score from 0 to 100.

A pure function of facts that others gathered; every missing point says what to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from apr_dist.apr.metadata import AprMetadata

SHIP_READY: Final = 90


@dataclass(frozen=True, kw_only=True)
class QualityFacts:
    """What the score is computed from.

    Attributes:
        metadata: what the file says.
        checksums_valid: header and footer checksums match.
        non_finite: name of the first tensor with a NaN or an infinity; None when there is none.
        contradictions: typed keys (``hidden_size``, ...) that the tensors' shapes contradict.
        family_shown: family that the tensor names show; None when they cannot tell.
        family_claimed: family that the hf keys claim; None when they claim none.
        tokenizer_tokens: entries of the tokenizer inside the file or beside it; None without one.
    """

    metadata: AprMetadata
    checksums_valid: bool
    non_finite: str | None
    contradictions: frozenset[str]
    family_shown: str | None
    family_claimed: str | None
    tokenizer_tokens: int | None


@dataclass(frozen=True)
class QualityPart:
    """One sub-score: points reached of the maximum, and what would bring the rest."""

    name: str
    points: int
    maximum: int
    remedies: tuple[str, ...]


@dataclass(frozen=True)
class Quality:
    """The whole score and its parts."""

    parts: tuple[QualityPart, ...]

    @property
    def score(self) -> int:
        """Sum of the parts, 0 to 100."""
        return sum(part.points for part in self.parts)

    @property
    def ship_ready(self) -> bool:
        """Whether the score reaches 90."""
        return self.score >= SHIP_READY

    def to_json(self) -> dict[str, Any]:
        """The score as plain JSON values."""
        return {
            "score": self.score,
            "ship_ready": self.ship_ready,
            "breakdown": {part.name: part.points for part in self.parts},
            "remedies": [remedy for part in self.parts for remedy in part.remedies],
        }


def score_quality(facts: QualityFacts) -> Quality:
    """Physics 20, structural 20, provenance 25, hf_identity 20, tokenizer 15."""
    return Quality(
        (_physics(facts), _structural(facts), _provenance(facts), _hf_identity(facts), _tokenizer(facts))
    )


_Item = tuple[int, bool, str]


def _part(name: str, items: Sequence[_Item]) -> QualityPart:
    return QualityPart(
        name,
        sum(points for points, reached, _ in items if reached),
        sum(points for points, _, _ in items),
        tuple(remedy for _, reached, remedy in items if not reached),
    )


def _physics(facts: QualityFacts) -> QualityPart:
    items = [
        (10, facts.checksums_valid, "copy or download the file again: its checksum does not match"),
        (10, facts.non_finite is None, f"start from an earlier checkpoint: {facts.non_finite} is not finite"),
    ]
    return _part("physics", items)


def _structural(facts: QualityFacts) -> QualityPart:
    known = facts.metadata.architecture not in (None, "", "unknown")
    items = [(5, known, "apr-dist stamp --architecture")]
    for key in ("hidden_size", "num_layers", "num_heads"):
        stated = getattr(facts.metadata, key) is not None
        true = stated and key not in facts.contradictions
        wrong = f"{key} contradicts the tensors' shapes" if stated else f"{key} is not stated"
        items.append((5, true, f"{wrong}: import the model again from its source"))
    return _part("structural", items)


def _provenance(facts: QualityFacts) -> QualityPart:
    flags = {"license": 9, "data_source": 8, "data_license": 8}
    return _part(
        "provenance",
        [
            (points, bool(getattr(facts.metadata, key)), f"apr-dist stamp --{key.replace('_', '-')}")
            for key, points in flags.items()
        ],
    )


def _hf_identity(facts: QualityFacts) -> QualityPart:
    shown, claimed = facts.family_shown, facts.family_claimed
    agree = shown is None or claimed is None or shown == claimed
    dispute = "" if agree else f" (it claims {claimed}, its tensors show {shown})"
    return _part(
        "hf_identity",
        [
            (
                points,
                bool(getattr(facts.metadata, key)) and agree,
                f"apr-dist stamp --{key.replace('_', '-')}{dispute}",
            )
            for key, points in {"hf_architecture": 12, "hf_model_type": 8}.items()
        ],
    )


def _tokenizer(facts: QualityFacts) -> QualityPart:
    tokens, rows = facts.tokenizer_tokens, facts.metadata.vocab_size
    fits = tokens is not None and 0 < tokens <= (rows or tokens)
    reason = "" if tokens is None or fits else f" (it has {tokens} tokens, the model {rows} rows)"
    return _part("tokenizer", [(15, fits, f"apr-dist stamp --tokenizer{reason}")])
