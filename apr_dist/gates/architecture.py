"""Gate: the file is a decoder this project can train, and its two witnesses agree on which.

The metadata claim a family, the tensor names show one (INV-INIT-ARCH-MATCH-001). Dimensions come
from the file alone; a missing one is refused, never filled in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apr_dist.errors import ArchitectureRefused
from apr_dist.model.config import TransformerConfig, how_to_state, is_source
from apr_dist.model.families import (
    UNKNOWN,
    Family,
    family_from_tensor_names,
    family_named,
    is_encoder,
    normalize_metadata_family,
    only_shares_names,
)

MATCH = "FALSIFY-INIT-ARCH-MATCH-001"
ENCODER = "FALSIFY-APR-PRETRAIN-ARCH-007"
METADATA = "FALSIFY-APR-PRETRAIN-INIT-005"
TIED = "FALSIFY-APR-DIST-TRAINER-003"

CLAIM_KEYS = ("hf_architecture", "architecture", "hf_model_type")
"""Metadata keys that say which family a file is."""

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class HeadFacts:
    """What the file holds of the output head.

    Attributes:
        present: whether ``lm_head.weight`` is in the file.
        equals_embedding: whether its values are the embedding's (None when absent).
    """

    present: bool
    equals_embedding: bool | None


def check_family(metadata: Mapping[str, Any], names: Iterable[str], *, where: Path) -> Family:
    """Which decoder family the file is, agreed by every metadata claim and the tensor names.

    Names that belong to no family, and an ``architecture`` that is not listed, are no witness; the other
    one is trusted. A model type or a class of a causal model must be one whose arithmetic is known.

    Raises:
        ArchitectureRefused: an encoder, two witnesses that contradict each other, no witness at
            all, or a family that is not one of the decoders.
    """
    names = list(names)
    shown = family_from_tensor_names(names)
    texts = [str(metadata[key]).strip() for key in CLAIM_KEYS if metadata.get(key)]
    if any(is_encoder(text) for text in (*texts, shown)):
        raise ArchitectureRefused(
            f"this is an encoder ({texts[0] if texts else shown}); it has no next-token head to train",
            where=where,
            expected=f"a decoder: {', '.join(Family)}",
            remedy="start from a causal language model",
            falsifier=ENCODER,
        )
    if any(only_shares_names(text) for text in texts):
        raise _not_trained_here(texts[0], where)  # said first: its names may show a family of ours
    for text in (_causal_class(metadata.get("hf_architecture")), str(metadata.get("hf_model_type") or "")):
        if text and normalize_metadata_family(text) is None:
            raise _not_trained_here(text, where)
    _refuse_joined(texts, names, where)
    claims = {text: family for text in texts if (family := normalize_metadata_family(text)) is not None}
    witnesses = list(claims.values()) + ([shown] if shown != UNKNOWN else [])
    if len(set(witnesses)) > 1:
        raise _contradiction(claims, shown, where)
    return _decoder(witnesses, texts, where)


def _refuse_joined(texts: Iterable[str], names: Iterable[str], where: Path) -> None:
    """Refuse projections that lie as one tensor, as in other formats of a family that is claimed."""
    claimed = {family for text in texts if (family := family_named(text)) is not None}
    for family in claimed:
        for whole, parts in family.definition.joined.items():
            held = next((name for name in names if f".{whole}." in name), None)
            if held is not None:
                shown = ", ".join(part.rpartition(".")[2] for part in parts)
                raise ArchitectureRefused(
                    f"{held} of this {family.hf_architecture} holds {shown} as one tensor",
                    where=where,
                    expected="a tensor for each",
                    remedy=f"apr-dist import {where} -o split.apr",
                    falsifier=METADATA,
                )


def check_dimensions(
    metadata: Mapping[str, Any], head: HeadFacts, *, family: Family, where: Path
) -> TransformerConfig:
    """All dimensions from the file, and whether head and embedding are one parameter.

    Raises:
        ArchitectureRefused: a dimension is missing or impossible, or the tie contradicts the tensors.
    """
    tied = check_tie(metadata.get("tie_word_embeddings"), head, where=where)
    return TransformerConfig.from_metadata(metadata, family=family, where=where, tie_word_embeddings=tied)


def _contradiction(claims: Mapping[str, str], shown: str, where: Path) -> ArchitectureRefused:
    said = " and ".join(f"{text!r} (family {family})" for text, family in claims.items())
    if shown == UNKNOWN:
        return ArchitectureRefused(
            f"metadata claim {said}", where=where, expected="claims of one family", falsifier=MATCH
        )
    family = family_named(shown)
    return ArchitectureRefused(
        f"metadata claim {said}, and the tensor names are those of {shown}",
        where=where,
        expected="metadata and tensors of one family",
        remedy="start from a model of one of the families that are trained here"
        if family is None
        else how_to_state(
            where,
            architecture=family,
            hf_architecture=family.hf_architecture,
            hf_model_type=family.hf_model_type,
        ),
        falsifier=MATCH,
    )


def _decoder(witnesses: list[str], texts: list[str], where: Path) -> Family:
    if not witnesses:
        raise ArchitectureRefused(
            "neither metadata nor tensor names say which architecture this is",
            where=where,
            expected="metadata key architecture, or Hugging Face tensor names",
            remedy=how_to_state(where, architecture="FAMILY", hf_architecture="CLASS"),
            falsifier=METADATA,
        )
    # Several families share tensor names; each claim must be of one whose arithmetic is ours.
    named = [family_named(text) for text in texts if normalize_metadata_family(text) is not None]
    if None in named or witnesses[0] not in list(Family):
        raise _not_trained_here(texts[0] if texts else witnesses[0], where)
    return next((one for one in named if one and one != one.named_like), Family(witnesses[0]))


def _causal_class(text: object) -> str:
    """The text, where it is spelled as ``transformers`` spells a class with a next-token head."""
    name = str(text or "").strip()
    return name if name.endswith(("ForCausalLM", "LMHeadModel")) else ""


def _not_trained_here(name: str, where: Path) -> ArchitectureRefused:
    return ArchitectureRefused(
        f"the architecture {name!r} is not one this decoder can be",
        where=where,
        expected=f"one of {', '.join(Family)}",
        remedy="start from a model of one of these families",
        falsifier=METADATA,
    )


def check_tie(claim: object, head: HeadFacts, *, where: Path) -> bool:
    """Whether head and embedding are one parameter.

    Raises:
        ArchitectureRefused: the claim is neither true nor false, or contradicts the tensors.
    """
    if claim is not None and not isinstance(claim, bool):
        shown = not head.present or bool(head.equals_embedding)
        raise _tie_refused(f"tie_word_embeddings is {claim!r}", "true or false", shown, where)
    if not head.present:
        if claim is False:
            raise ArchitectureRefused(
                f"metadata say tie_word_embeddings false and there is no {HEAD}",
                where=where,
                expected=f"{HEAD}, or tie_word_embeddings true",
                remedy="get a complete copy of the model; if its head is the embedding, state that: "
                + how_to_state(where, tie_word_embeddings=True)
                + (", or import it with --tie" if is_source(where) else ""),
                falsifier=TIED,
            )
        return True
    if claim is True and head.equals_embedding is False:
        raise _tie_refused(
            f"metadata say tie_word_embeddings true and {HEAD} differs from the embedding",
            "one matrix, or tie_word_embeddings false",
            False,
            where,
        )
    return bool(head.equals_embedding) if claim is None else claim


def _tie_refused(what: str, expected: str, shown: bool, where: Path) -> ArchitectureRefused:
    remedy = how_to_state(where, tie_word_embeddings=shown) + ", as the tensors show"
    return ArchitectureRefused(what, where=where, expected=expected, remedy=remedy, falsifier=TIED)
