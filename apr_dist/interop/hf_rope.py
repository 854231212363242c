"""The rotation that a Hugging Face ``config.json`` states, in the spellings of every release, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apr_dist.model.config import TransformerConfig
from apr_dist.model.families import FULL_ATTENTION, SLIDING_ATTENTION, Family
from apr_dist.model.rope_scaling import RopeScaling, RopeScalingType, refuse_key

_LOCAL_THETA = "rope_local_base_freq"
_PARTIAL, _ORIGINAL, _BETA = (
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "llama_4_scaling_beta",
)
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", _ORIGINAL, _PARTIAL, _LOCAL_THETA)
"""Keys that together state the rotation."""


@dataclass(frozen=True)
class _Rotation:
    """What one object of parameters states.

    Attributes:
        theta: base of the frequencies.
        scaling: how they are stretched.
        options: fields of the model's options that are not neutral.
    """

    theta: Any
    scaling: RopeScaling | None
    options: Mapping[str, Any]


def read_rope(
    config: Mapping[str, Any], family: Family, stated: Mapping[str, Any], where: Path
) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``, and the options of a family that rotates in other ways too.

    Args:
        config: the configuration.
        family: what it is a configuration of.
        stated: its values, those of absent keys the family's defaults.
        where: the file, for errors.

    Raises:
        ArchitectureRefused: a rotation that is not computed.
    """
    local: dict[str, Any] = {}
    if family.definition.local_rope:
        far, near = _layered_rope(config, family, stated, where)
        local = {"rope_local_theta": near.theta}
    else:
        far = _one_rope(config, family, stated, where)
    return {
        "rope_theta": far.theta,
        "rope_scaling": far.scaling and far.scaling.to_mapping(),
        **local,
        **far.options,
    }


def state_rope(config: dict[str, Any], model: TransformerConfig) -> None:
    """Put the model's rotation into a configuration, in the spelling that it has already."""
    facts = model.family.definition
    newer, null = isinstance(config.get("rope_parameters"), Mapping), "rope_scaling" in config
    defaults = facts.hf_defaults
    if model.rope_local_theta is not None and _LOCAL_THETA not in defaults:
        newer |= model.rope_local_theta != defaults["rope_theta"]  # no older key states it
    before = {key: config.pop(key, None) for key in ROPE_KEYS}
    scaling = _stated_scaling(model)
    if _ORIGINAL in defaults:  # beside the scaling in every release
        original = scaling.pop(_ORIGINAL, None) if scaling else before[_ORIGINAL]
        config |= {_ORIGINAL: original} if original is not None else {}
    partial = {_PARTIAL: model.partial_rotary_factor}
    if model.partial_rotary_factor == 1.0 and before[_PARTIAL] is None:
        partial = {}
    if newer or facts.rope_default:  # the spelling of transformers 5
        plain = {"rope_type": "default"}
        rope: dict[str, Any] = (scaling or plain) | {"rope_theta": model.rope_theta, **partial}
        if model.rope_local_theta is not None:
            rope = {FULL_ATTENTION: rope, SLIDING_ATTENTION: plain | {"rope_theta": model.rope_local_theta}}
        config["rope_parameters"] = rope
        return
    config |= {"rope_theta": model.rope_theta, **partial}
    if _LOCAL_THETA in defaults:
        config[_LOCAL_THETA] = model.rope_local_theta
    if scaling or null:
        config["rope_scaling"] = scaling


def _stated_scaling(model: TransformerConfig) -> dict[str, Any] | None:
    """The scaling in Hugging Face's words, without what follows from the rest."""
    scaling = model.rope_scaling
    if scaling is None:
        return None
    values = scaling.to_mapping()
    if scaling.rope_type is RopeScalingType.LONGROPE:
        follows = _stretch(model.max_position_embeddings, scaling.original_max_position_embeddings)
        if scaling.factor == follows:  # older releases of transformers allow no further key
            del values["factor"]
    if model.family.definition.rope_aliases:  # and read the type by its older key
        values = {"type": values.pop("rope_type"), **values}
    if model.llama_4_scaling_beta is not None:
        values[_BETA] = model.llama_4_scaling_beta
        if values.get("attention_factor") == 1.0:  # as converters expect it
            del values["attention_factor"]
            values |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    return values


def _one_rope(config: Mapping[str, Any], family: Family, stated: Mapping[str, Any], where: Path) -> _Rotation:
    """The rotation as ``transformers`` reads it: ``rope_scaling`` first, and its own theta first."""
    given = config.get("rope_scaling") or config.get("rope_parameters")
    if given is None:
        given = family.definition.rope_default
    if not isinstance(given, Mapping):
        raise refuse_key("rope_scaling", given, "an object or null", where=where)
    if any(isinstance(value, Mapping) for value in given.values()):
        raise refuse_key("rope_parameters", dict(given), "one rotation for all layers", where=where)
    return _rotation(given, stated["rope_theta"], config, family, stated, where)


def _layered_rope(
    config: Mapping[str, Any], family: Family, stated: Mapping[str, Any], where: Path
) -> tuple[_Rotation, _Rotation]:
    """The rotation of layers that see everything, and that of those with a window, which is not scaled.

    ``transformers`` reads an object for each kind of layer; a ``rope_scaling`` is of the first alone.
    """
    given = config.get("rope_parameters")
    given = {} if given is None else given
    kinds = (FULL_ATTENTION, SLIDING_ATTENTION)
    if not isinstance(given, Mapping) or not all(
        kind in kinds and isinstance(one, Mapping | None) for kind, one in given.items()
    ):
        raise refuse_key("rope_parameters", given, f"an object for each of {', '.join(kinds)}", where=where)
    older = config.get("rope_scaling")
    if older is not None and not isinstance(older, Mapping):
        raise refuse_key("rope_scaling", older, "an object or null", where=where)
    far = dict(given.get(FULL_ATTENTION) or {}) | dict(older or {})
    near = given.get(SLIDING_ATTENTION) or {}
    own = stated.get(_LOCAL_THETA, family.definition.hf_defaults["rope_theta"])
    local = _rotation(near, own, config, family, stated, where)
    if local.scaling is not None:
        raise refuse_key("rope_parameters", dict(near), "no scaling for layers with a window", where=where)
    return _rotation(far, stated["rope_theta"], config, family, stated, where), local


def _rotation(
    given: Mapping[str, Any],
    default: Any,
    config: Mapping[str, Any],
    family: Family,
    stated: Mapping[str, Any],
    where: Path,
) -> _Rotation:
    """What one object of parameters states."""
    rope, options = dict(given), family.definition.options
    found = {_PARTIAL: rope.pop(_PARTIAL, config.get(_PARTIAL))}
    if _PARTIAL not in options and (part := found.pop(_PARTIAL)) not in (None, 1.0):
        raise refuse_key(_PARTIAL, part, "1.0: the whole head is rotated", where=where)
    if _BETA in options:
        found[_BETA] = rope.pop(_BETA, None)
        rope.pop("max_position_embeddings", None)  # of the model's length, which its own key states
    theta = rope.pop("rope_theta", default)
    kind = rope.pop("rope_type", rope.pop("type", None))
    rope.pop("type", None)
    kind = family.definition.rope_aliases.get(str(kind), kind)
    positions = stated["max_position_embeddings"]
    if kind in ("llama3", "yarn", "longrope"):
        top_level = stated.get(_ORIGINAL, config.get(_ORIGINAL))
        rope[_ORIGINAL] = rope.get(_ORIGINAL, positions) if top_level is None else top_level
    if kind == "yarn":
        _settle_yarn(rope, positions)
    if kind == "longrope" and rope.get("factor") is None:
        rope["factor"] = _stretch(positions, rope[_ORIGINAL])
    scaling = RopeScaling.from_mapping(rope | {"rope_type": kind}, where=where)
    return _Rotation(theta, scaling, {key: value for key, value in found.items() if value is not None})


def _stretch(positions: Any, original: Any) -> float:
    """The factor that follows from two lengths; a shorter one is no stretch."""
    if not _is_number(positions) or not _is_number(original) or not original:
        return 1.0  # refused as what they are
    return max(1.0, float(positions / original))


def _settle_yarn(rope: dict[str, Any], positions: Any) -> None:
    """Replace what is derived: a factor from lengths, the attention factor from mscale, null by defaults."""
    original = rope["original_max_position_embeddings"]
    if rope.get("factor", 0) is None and _is_number(positions) and _is_number(original) and original:
        rope["factor"] = positions / original
    scale, scale_all = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
    numbers = all(map(_is_number, (rope.get("factor"), scale, scale_all)))
    if rope.get("attention_factor") is None and numbers and scale and scale_all and rope["factor"] >= 1:
        log = 0.1 * math.log(rope["factor"])
        rope["attention_factor"] = (scale * log + 1.0) / (scale_all * log + 1.0)
    for key in ("beta_fast", "beta_slow"):
        if not rope.get(key, True):
            del rope[key]
    if rope.get("truncate", True) is None:
        rope["truncate"] = False


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
