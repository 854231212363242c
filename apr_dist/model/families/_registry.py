"""The families there are: every file of this package without an underscore, and how texts name them."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from apr_dist.model.families._definition import FamilyDefinition
from apr_dist.model.families._others import (
    CLAIMS,
    CLASS_PREFIXES,
    ENCODERS,
    NAMED_LIKE_OURS,
    TENSOR_MARKS,
)

UNKNOWN: Final = "unknown"
"""The answer of tensor names that belong to no known family, or to GGUF, which cannot tell."""


def _discover() -> dict[str, FamilyDefinition]:
    """``FAMILY`` of each file of this package, by slug."""
    found: dict[str, FamilyDefinition] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if not module.name.startswith("_"):
            definition = importlib.import_module(f"{__package__}.{module.name}").FAMILY
            found[definition.slug] = definition
    return found


_DEFINITIONS: Final = _discover()


class _FamilyName(StrEnum):
    """A family's slug, with everything its file states."""

    @property
    def definition(self) -> FamilyDefinition:
        """What the family's file states."""
        return _DEFINITIONS[self.value]

    @property
    def hf_architecture(self) -> str:
        """Class name in the Hugging Face ``config.json``, such as ``Qwen2ForCausalLM``."""
        return self.definition.hf_architecture

    @property
    def hf_model_type(self) -> str:
        """``model_type`` in the Hugging Face ``config.json``."""
        return self.definition.hf_model_type

    @property
    def named_like(self) -> str:
        """Slug of the family whose tensor names it has, mostly its own."""
        return self.definition.named_like or self.value


if TYPE_CHECKING:
    Family = _FamilyName
else:
    Family = _FamilyName("Family", {slug.upper(): slug for slug in _DEFINITIONS})
    Family.__doc__ = "The decoder families that one network covers by configuration, one file each."


def _claims() -> dict[str, str]:
    """The family whose tensor names a text's model has, by that text and its capitalised spelling."""
    texts: dict[str, str] = {}
    for family in Family:
        facts = family.definition
        for claim in (facts.hf_architecture, facts.hf_model_type, facts.slug, *facts.claims):
            texts[claim] = family.named_like
    texts |= {claim: shown for shown, claims in CLAIMS.items() for claim in claims}
    return {
        spelling: shown
        for claim, shown in texts.items()
        for spelling in (claim, claim[:1].upper() + claim[1:])
    }


_FAMILY_OF_CLAIM: Final[Mapping[str, str]] = _claims()
_MARKS: Final = sorted(
    (
        (tuple(re.compile(mark) for mark in marks), family.named_like)
        for family in Family
        for marks in family.definition.tensor_marks
    ),
    key=lambda item: -len(item[0]),
)


def only_shares_names(claim: str) -> bool:
    """Whether a class name or model type is of a model named like one of ours whose arithmetic differs."""
    return NAMED_LIKE_OURS.match(claim) is not None and family_named(claim) is None


def family_from_tensor_names(names: Iterable[str]) -> str:
    """The family that a file's tensor names show.

    Answers a family of ours, one of mamba, rwkv, gpt-neox, opt, bert, gpt2, or unknown. GGUF names
    (``blk.0...``) are the same for every family, so they answer unknown. Encoders that are exported
    without their ``bert.`` prefix are bert.
    """
    joined = "\n" + "\n".join(names)
    for other, pattern in TENSOR_MARKS:
        if pattern.search(joined):
            return other
    return next((shown for marks, shown in _MARKS if all(mark.search(joined) for mark in marks)), UNKNOWN)


def normalize_metadata_family(text: str) -> str | None:
    """The family a metadata text claims: a class name, a slug or a capitalised slug; else None.

    ``Qwen2ForCausalLM``, ``qwen2`` and ``Qwen2`` are all qwen2; Mistral and Phi are llama, by whose
    names their tensors go. A text that is not listed is no claim.
    """
    claim = text.strip()
    if claim in _FAMILY_OF_CLAIM:
        return _FAMILY_OF_CLAIM[claim]
    return next((family for prefix, family in CLASS_PREFIXES.items() if claim.startswith(prefix)), None)


def is_encoder(text: str) -> bool:
    """Whether a slug or class name is that of an encoder (BERT and its relatives)."""
    lowered = text.lower()
    return any(encoder in lowered for encoder in ENCODERS)


def family_named(text: str) -> Family | None:
    """The family that a slug, class name, model type or other listed text names; else None."""
    claim = text.strip().lower()
    for family in Family:
        facts = family.definition
        listed = (facts.slug, facts.hf_architecture, facts.hf_model_type, *facts.claims)
        if claim in {one.lower() for one in listed}:
            return family
    return None


def family_of_model_type(model_type: str) -> Family | None:
    """The family whose arithmetic that ``model_type`` is known to have; None for every other one."""
    return next((family for family in Family if family.hf_model_type == model_type), None)


def family_of_gguf(architecture: object, fields: Mapping[str, Any]) -> Family | None:
    """The family as which a GGUF file of that architecture and with these fields is read."""
    readers = [
        family
        for family in Family
        if (form := family.definition.gguf).architecture == architecture and form.imported
    ]
    stated = (
        family for family in readers if fields.get(f"{architecture}.{family.definition.gguf.stated_by}")
    )
    plain = (family for family in readers if family.definition.gguf.stated_by is None)
    return next(stated, next(plain, None))


def decoder_family(slug: str, hf_model_type: str | None = None) -> Family | None:
    """The decoder to build for a family (slug or class name) and the file's ``hf_model_type``.

    A family may have the tensor names of another (Mistral has Llama's), so ``hf_model_type`` (or an
    architecture text given in its place) decides. None: an encoder, a family that is not trained here,
    or an ``hf_model_type`` that is not listed.
    """
    named = family_named(slug)
    if not (hf_model_type or "").strip() or named is None:
        return named
    by_type = family_named(str(hf_model_type))
    return by_type if by_type is not None and by_type.named_like == named.named_like else None
