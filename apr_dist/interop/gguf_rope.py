"""The rotary scaling of a GGUF file in Hugging Face's terms, and back.

llama.cpp scales linearly unless a type is stated. Llama 3's scaling has no fields: a tensor holds by what the
frequency of each pair of dimensions is divided, and the factors that gave it are found again from its values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from apr_dist.errors import UnsupportedModelFile
from apr_dist.interop.convert import shortest_float
from apr_dist.interop.gguf_names import ROPE_FACTORS
from apr_dist.model.families import GgufForm
from apr_dist.model.rope_scaling import RopeScaling, RopeScalingType

LOG_MULTIPLIER: Final = "rope.scaling.yarn_log_multiplier"
LONG_FACTORS: Final = {
    "long_factor": "rope_factors_long.weight",
    "short_factor": "rope_factors_short.weight",
}
"""Tensors of LongRoPE's factors by their fields of a scaling."""

_TOLERANCE = 1e-5
"""Relative; f32 arithmetic of another order differs by less."""


def read_rope_scaling(
    fields: Mapping[str, Any],
    divisors: npt.NDArray[np.float32] | None,
    long_factors: Mapping[str, tuple[float, ...]] | None,
    *,
    theta: float,
    head_dim: int,
    positions: int,
    where: Path,
) -> RopeScaling | None:
    """The scaling that fields ``rope.*`` (without the architecture) and tensors state.

    Args:
        fields: of the file.
        divisors: of Llama 3's scaling.
        long_factors: LongRoPE's, by their fields of a scaling.
        theta: base of the frequencies.
        head_dim: dimensions of a head that are rotated.
        positions: of the model.
        where: the file, for errors.

    Raises:
        UnsupportedModelFile: a type that is not computed, or two that contradict each other.
        ArchitectureRefused: a factor that is impossible.
    """
    prefix = "rope.scaling."
    kind = fields.get(f"{prefix}type", "linear")
    if long_factors is not None:
        return _longrope(fields, long_factors, kind, positions, where)
    factor = _number(fields, f"{prefix}factor", _number(fields, "rope.scale_linear", 0.0, where), where)
    if kind not in ("none", "linear", "yarn"):
        raise _refused(where, f"states rope.scaling.type {kind!r}", "none, linear or yarn scaling")
    if kind != "yarn":
        if _number(fields, f"{prefix}attn_factor", 1.0, where) != 1.0:
            raise _refused(where, "states rope.scaling.attn_factor without yarn", "1.0")
        plain = kind == "none" or factor in (0.0, 1.0)
        if divisors is None or bool((divisors == 1.0).all()):
            return None if plain else RopeScaling(rope_type=RopeScalingType.LINEAR, factor=factor)
        if not plain:
            raise _refused(
                where, "scales its rotary embedding twice, by a factor and a tensor", "one of them"
            )
        original = fields.get(f"{prefix}original_context_length", positions)
        return _of_divisors(divisors, _frequencies(theta, head_dim), int(original), where)
    if divisors is not None:
        raise _refused(where, "scales its rotary embedding twice, by yarn and a tensor", "one of them")
    return RopeScaling(
        rope_type=RopeScalingType.YARN,
        factor=factor or 1.0,
        original_max_position_embeddings=int(fields.get(f"{prefix}original_context_length", positions)),
        beta_fast=_number(fields, f"{prefix}yarn_beta_fast", 32.0, where),
        beta_slow=_number(fields, f"{prefix}yarn_beta_slow", 1.0, where),
        attention_factor=_attention_factor(fields, prefix, factor or 1.0, where),
    )


def _longrope(
    fields: Mapping[str, Any],
    factors: Mapping[str, tuple[float, ...]],
    kind: object,
    positions: int,
    where: Path,
) -> RopeScaling:
    """LongRoPE's scaling; its factor follows from two lengths, and a file may leave the type out."""
    if kind not in ("linear", "longrope") or _number(fields, "rope.scaling.factor", 0.0, where) not in (
        0.0,
        1.0,
    ):
        raise _refused(
            where, f"scales its rotary embedding by {kind} and by LongRoPE's factors", "one of them"
        )
    original = int(fields.get("rope.scaling.original_context_length", positions))
    scaling = RopeScaling(
        rope_type=RopeScalingType.LONGROPE,
        factor=max(1.0, positions / original),
        original_max_position_embeddings=original,
        short_factor=factors["short_factor"],
        long_factor=factors["long_factor"],
    )
    stated = _number(fields, "rope.scaling.attn_factor", 1.0, where)
    if math.isclose(stated, scaling.rotation_factor, rel_tol=_TOLERANCE):
        return scaling
    return replace(scaling, attention_factor=stated)


def rope_fields(scaling: RopeScaling | None, form: GgufForm, where: Path) -> dict[str, str | int | float]:
    """The fields ``rope.scaling.*`` of a scaling; Llama 3's has none.

    Raises:
        UnsupportedModelFile: there is no field for what the scaling states.
    """
    if scaling is None or scaling.rope_type is RopeScalingType.LLAMA3:
        return {}
    if scaling.rope_type is RopeScalingType.LONGROPE:  # no type and no factor, as converters write it
        return {
            "rope.scaling.original_context_length": scaling.original_max_position_embeddings or 0,
            "rope.scaling.attn_factor": scaling.rotation_factor,
        }
    fields: dict[str, str | int | float] = {"type": scaling.rope_type.value, "factor": float(scaling.factor)}
    if scaling.rope_type is RopeScalingType.YARN:
        if not scaling.truncate:
            raise UnsupportedModelFile(
                "rope_scaling.truncate is false, for which a GGUF file has no word",
                where=where,
                expected="yarn whose dimensions are rounded",
                remedy="export to a Hugging Face folder instead",
            )
        fields["original_context_length"] = scaling.original_max_position_embeddings or 0
        fields |= {"yarn_beta_fast": scaling.beta_fast, "yarn_beta_slow": scaling.beta_slow}
        if scaling.attention_factor == 1.0 and LOG_MULTIPLIER in form.keys:
            fields["yarn_log_multiplier"] = 1.0
        elif scaling.attention_factor is not None:
            # Converters write the first; llama.cpp multiplies its own attention factor by the second.
            fields["yarn_attn_factor"] = scaling.attention_factor
            fields["attn_factor"] = scaling.attention_factor / _default_attention_factor(scaling.factor)
    return {f"rope.scaling.{key}": value for key, value in fields.items()}


def rope_tensors(
    scaling: RopeScaling | None, *, theta: float, head_dim: int
) -> dict[str, npt.NDArray[np.float32]]:
    """Tensors that state a scaling, by their names in a file."""
    if scaling is not None and scaling.rope_type is RopeScalingType.LONGROPE:
        return {name: np.array(getattr(scaling, ours), np.float32) for ours, name in LONG_FACTORS.items()}
    divisors = rope_divisors(scaling, theta=theta, head_dim=head_dim)
    return {} if divisors is None else {ROPE_FACTORS: divisors}


def computed_tensors(form: GgufForm) -> tuple[str, ...]:
    """Names of such tensors that an architecture reads; none is a weight."""
    return (
        *([ROPE_FACTORS] if form.rope_factors else []),
        *(LONG_FACTORS.values() if form.long_factors else []),
    )


def rope_divisors(
    scaling: RopeScaling | None, *, theta: float, head_dim: int
) -> npt.NDArray[np.float32] | None:
    """What the frequency of each pair of dimensions is divided by, for Llama 3's scaling."""
    if scaling is None or scaling.rope_type is not RopeScalingType.LLAMA3:
        return None
    low, high = scaling.low_freq_factor or 0.0, scaling.high_freq_factor or 0.0
    return _divisors(
        _frequencies(theta, head_dim),
        factor=scaling.factor,
        slope=(scaling.original_max_position_embeddings or 0) / (high - low),
        offset=low / (high - low),
    ).astype(np.float32)


def _frequencies(theta: float, head_dim: int) -> npt.NDArray[np.float64]:
    """Turns per token of each pair of dimensions."""
    frequencies: npt.NDArray[np.float64] = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    return frequencies


def _divisors(
    turns: npt.NDArray[np.float64], *, factor: float, slope: float, offset: float
) -> npt.NDArray[np.float64]:
    kept = np.clip(turns * slope - offset, 0.0, 1.0)
    return 1.0 / ((1.0 - kept) / factor + kept)


def _of_divisors(
    divisors: npt.NDArray[np.float32], turns: npt.NDArray[np.float64], positions: int, where: Path
) -> RopeScaling:
    """The Llama 3 scaling that gives these divisors; of several with equal frequencies the usual one."""
    if divisors.shape == turns.shape and (divisors >= 1.0).all() and np.isfinite(divisors).all():
        factor = shortest_float(float(divisors.max()))
        for low, high, original in _candidates(divisors.astype(np.float64), turns, factor, positions):
            found = _divisors(turns, factor=factor, slope=original / (high - low), offset=low / (high - low))
            if np.allclose(found, divisors, rtol=_TOLERANCE, atol=0.0):
                return RopeScaling(
                    rope_type=RopeScalingType.LLAMA3,
                    factor=factor,
                    low_freq_factor=low,
                    high_freq_factor=high,
                    original_max_position_embeddings=original,
                )
    raise _refused(
        where,
        "divides its rotary frequencies by rope_freqs.weight, whose values are not Llama 3's",
        "Llama 3's scaling, or none",
    )


def _candidates(
    divisors: npt.NDArray[np.float64], turns: npt.NDArray[np.float64], factor: float, positions: int
) -> list[tuple[float, float, int]]:
    """Factors and original length to try: Llama 3's own first, then a line through the blended dimensions.

    What is kept of a frequency is a line over its turns: ``(original * turns - low) / (high - low)``. It is
    0 at ``low / original`` turns and 1 at ``high / original``; only these two and the factor can be known.
    """
    lengths = list(dict.fromkeys((8192, *(positions >> shift for shift in range(12) if positions >> shift))))
    tried = [(1.0, 4.0, original) for original in lengths]
    kept = (1.0 / divisors - 1.0 / factor) / (1.0 - 1.0 / factor) if factor > 1.0 else np.ones_like(divisors)
    for none, whole in _lines(kept, turns):
        tried += [
            (round(none * original, digits), round(whole * original, digits), original)
            for digits in (4, 12)
            for original in lengths
        ]
    return [one for one in tried if 0.0 < one[0] < one[1]]


def _lines(kept: npt.NDArray[np.float64], turns: npt.NDArray[np.float64]) -> list[tuple[float, float]]:
    """Turns at which nothing and everything is kept, by lines through what is known of each dimension."""
    blended = (kept > 1e-4) & (kept < 1.0 - 1e-4)
    points = list(zip(turns[blended], kept[blended], strict=True))
    if len(points) < 2:  # the nearest dimensions beside them bound the line
        points += [(turn, 0.0) for turn in turns[kept <= 1e-4][:1]]
        points += [(turn, 1.0) for turn in turns[kept >= 1.0 - 1e-4][-1:]]
    lines = []
    for (turn, share), (other, another) in itertools.combinations(points, 2):
        slope = (share - another) / (turn - other)
        if slope > 0.0:
            none = turn - share / slope
            lines.append((float(none), float(none + 1.0 / slope)))
    return sorted(lines, key=lambda line: line[0] - line[1])[:4]


def _default_attention_factor(factor: float) -> float:
    return 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _attention_factor(fields: Mapping[str, Any], prefix: str, factor: float, where: Path) -> float | None:
    """The whole factor of cosines and sines; None for the one that follows from the scaling's factor."""
    whole = fields.get(f"{prefix}yarn_attn_factor")
    multiplier = _number(fields, f"{prefix}attn_factor", 1.0, where)
    share = _number(fields, LOG_MULTIPLIER, 0.0, where)  # of the logarithm, by which llama.cpp divides
    multiplied = multiplier * _default_attention_factor(factor) / (1.0 + 0.1 * share * math.log(factor))
    if whole is None:
        return None if (multiplier, share) == (1.0, 0.0) else shortest_float(multiplied)
    whole = _number(fields, f"{prefix}yarn_attn_factor", 1.0, where)
    if multiplier != 1.0 and not math.isclose(whole, multiplied, rel_tol=_TOLERANCE):
        raise _refused(
            where, "states rope.scaling.attn_factor and another yarn_attn_factor", "one, or two that agree"
        )
    return whole


def _number(fields: Mapping[str, Any], key: str, default: float, where: Path) -> float:
    value = fields.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < math.inf:
        raise _refused(where, f"has {key} {value!r}", "a finite number")
    return shortest_float(float(value))


def _refused(where: Path, what: str, expected: str) -> UnsupportedModelFile:
    return UnsupportedModelFile(
        f"the GGUF file {what}",
        where=where,
        expected=expected,
        remedy="import the model from its Hugging Face folder, whose config.json states the scaling",
    )
