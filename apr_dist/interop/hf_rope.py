"""The rotation that a Hugging Face ``config.json`` states, in the spellings of every release, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apr_dist.model.config import TransformerConfig
from apr_dist.model.families import FULL_ATTENTION, SLIDING_ATTENTION, Family
from apr_dist.model.rope_scaling import RopeScaling, refuse_key

_LOCAL_THETA = "rope_local_base_freq"
ROPE_KEYS = (
    *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"),
    _LOCAL_THETA,
)
"""Keys that together state the rotation."""


def read_rope(
    config: Mapping[str, Any], family: Family, stated: Mapping[str, Any], where: Path
) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``; ``rope_local_theta`` of a family whose layers rotate in two ways.

    Args:
        config: the configuration.
        family: what it is a configuration of.
        stated: its values, those of absent keys the family's defaults.
        where: the file, for errors.

    Raises:
        ArchitectureRefused: a rotation that is not computed.
    """
    if not family.definition.local_rope:
        theta, scaling = _one_rope(config, stated, where)
        return {"rope_theta": theta, "rope_scaling": scaling and scaling.to_mapping()}
    theta, scaling, local = _layered_rope(config, family, stated, where)
    return {
        "rope_theta": theta,
        "rope_scaling": scaling and scaling.to_mapping(),
        "rope_local_theta": local,
    }


def state_rope(config: dict[str, Any], model: TransformerConfig) -> None:
    """Put the model's rotation into a configuration, in the spelling that it has already."""
    scaling = model.rope_scaling.to_mapping() if model.rope_scaling else None
    newer, null = isinstance(config.get("rope_parameters"), Mapping), "rope_scaling" in config
    defaults = model.family.definition.hf_defaults
    if model.rope_local_theta is not None and _LOCAL_THETA not in defaults:
        newer |= model.rope_local_theta != defaults["rope_theta"]  # no older key states it
    for key in ROPE_KEYS:
        config.pop(key, None)
    if newer:  # the spelling of transformers 5
        plain = {"rope_type": "default"}
        rope: dict[str, Any] = (scaling or plain) | {"rope_theta": model.rope_theta}
        if model.rope_local_theta is not None:
            rope = {FULL_ATTENTION: rope, SLIDING_ATTENTION: plain | {"rope_theta": model.rope_local_theta}}
        config["rope_parameters"] = rope
        return
    config["rope_theta"] = model.rope_theta
    if _LOCAL_THETA in defaults:
        config[_LOCAL_THETA] = model.rope_local_theta
    if scaling or null:
        config["rope_scaling"] = scaling


def _one_rope(
    config: Mapping[str, Any], stated: Mapping[str, Any], where: Path
) -> tuple[Any, RopeScaling | None]:
    """Theta and scaling as ``transformers`` reads them: ``rope_scaling`` first, and its own theta first."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise refuse_key("rope_scaling", given, "an object or null", where=where)
    if any(isinstance(value, Mapping) for value in given.values()):
        raise refuse_key("rope_parameters", dict(given), "one rotation for all layers", where=where)
    return _rotation(given, stated["rope_theta"], config, stated, where)


def _layered_rope(
    config: Mapping[str, Any], family: Family, stated: Mapping[str, Any], where: Path
) -> tuple[Any, RopeScaling | None, Any]:
    """Theta and scaling of layers that see everything, and theta of those with a window.

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
    theta, scaling = _rotation(far, stated["rope_theta"], config, stated, where)
    near = given.get(SLIDING_ATTENTION) or {}
    own = stated.get(_LOCAL_THETA, family.definition.hf_defaults["rope_theta"])
    local, stretched = _rotation(near, own, config, stated, where)
    if stretched is not None:
        raise refuse_key("rope_parameters", dict(near), "no scaling for layers with a window", where=where)
    return theta, scaling, local


def _rotation(
    given: Mapping[str, Any], default: Any, config: Mapping[str, Any], stated: Mapping[str, Any], where: Path
) -> tuple[Any, RopeScaling | None]:
    """Theta and scaling of one object of parameters."""
    rope = dict(given)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise refuse_key(
            "partial_rotary_factor",
            given["partial_rotary_factor"],
            "1.0: the whole head is rotated",
            where=where,
        )
    theta = rope.pop("rope_theta", default)
    kind = rope.get("rope_type", rope.get("type"))
    positions = stated["max_position_embeddings"]
    if kind in ("llama3", "yarn"):
        top_level = config.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = (
            rope.get("original_max_position_embeddings", positions) if top_level is None else top_level
        )
    if kind == "yarn":
        _settle_yarn(rope, positions)
    return theta, RopeScaling.from_mapping(rope, where=where)


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
