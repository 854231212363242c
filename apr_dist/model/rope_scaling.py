"""RoPE scaling: which stretches of the rotation frequencies there are, and their factors.

Facts and their validation only, no torch; ``rotary`` turns them into frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from apr_dist.errors import ArchitectureRefused

INCOMPLETE_METADATA: Final = "FALSIFY-APR-PRETRAIN-INIT-005"
"""Falsifier of a file whose architecture metadata is missing or bogus."""


class RopeScalingType(StrEnum):
    """Ways of stretching RoPE that the covered families use, by their Hugging Face names."""

    LINEAR = "linear"
    DYNAMIC = "dynamic"
    LLAMA3 = "llama3"
    YARN = "yarn"
    LONGROPE = "longrope"


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotation frequencies are stretched beyond the length of the first training.

    ``factor`` is the stretch. ``original_max_position_embeddings`` (llama3, yarn, longrope) is the length
    before it, in tokens. ``low_freq_factor`` and ``high_freq_factor`` belong to llama3; ``beta_fast``,
    ``beta_slow`` and ``truncate`` to yarn, with the defaults of its paper (arXiv:2309.00071);
    ``attention_factor`` to yarn and longrope. By ``short_factor`` or ``long_factor`` longrope
    (arXiv:2402.13753) divides each frequency, as a sequence has up to the original length or more. The
    names are those of ``rope_scaling`` in a Hugging Face ``config.json``.
    """

    rope_type: RopeScalingType
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.factor >= 1.0:
            raise refuse_key("rope_scaling.factor", self.factor, "a number of at least 1")
        for name in _NEEDED.get(self.rope_type, ()):
            if not (getattr(self, name) or 0) > 0:
                raise refuse_key(f"rope_scaling.{name}", getattr(self, name), "a positive number")
        if self.rope_type is RopeScalingType.LLAMA3 and not (
            (self.low_freq_factor or 0.0) < (self.high_freq_factor or 0.0)
        ):
            raise refuse_key(
                "rope_scaling.high_freq_factor",
                self.high_freq_factor,
                f"more than low_freq_factor ({self.low_freq_factor})",
            )
        if self.rope_type is RopeScalingType.LONGROPE:
            for name in ("short_factor", "long_factor"):
                if not all(factor > 0.0 for factor in getattr(self, name) or (0.0,)):
                    raise refuse_key(
                        f"rope_scaling.{name}", getattr(self, name), "a list of positive numbers"
                    )

    @property
    def by_length(self) -> bool:
        """Whether frequencies follow the length of each sequence."""
        return self.rope_type in (RopeScalingType.DYNAMIC, RopeScalingType.LONGROPE)

    @property
    def rotation_factor(self) -> float:
        """What cosines and sines are multiplied by.

        For yarn ``0.1 ln(factor) + 1`` (equation 22 of its paper), for longrope
        ``sqrt(1 + ln(factor) / ln(original))``, where no attention factor is stated; else 1.
        """
        if self.attention_factor is not None or self.factor == 1.0:
            return 1.0 if self.attention_factor is None else self.attention_factor
        if self.rope_type is RopeScalingType.YARN:
            return 0.1 * math.log(self.factor) + 1.0
        if self.rope_type is RopeScalingType.LONGROPE:
            return math.sqrt(
                1.0 + math.log(self.factor) / math.log(self.original_max_position_embeddings or 0)
            )
        return 1.0

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any] | None, *, where: str | Path) -> RopeScaling | None:
        """``rope_scaling`` as Hugging Face writes it (``type`` or ``rope_type``); None means plain RoPE.

        Raises:
            ArchitectureRefused: a type or a key that this project does not compute.
        """
        if values is None:
            return None
        if not isinstance(values, Mapping):
            raise refuse_key("rope_scaling", values, "an object or null", where=where)
        rest = dict(values)
        kind = rest.pop("rope_type", rest.pop("type", "default"))
        rest.pop("type", None)
        rest.pop("rope_theta", None)
        if kind in ("default", None):
            return None
        if kind not in list(RopeScalingType):
            raise refuse_key("rope_scaling.rope_type", kind, one_of([*RopeScalingType]), where=where)
        unknown = sorted(rest.keys() - cls.__dataclass_fields__.keys())
        if unknown or "factor" not in rest:
            what = f"unknown keys {unknown}" if unknown else "no factor"
            raise refuse_key("rope_scaling", what, one_of([*cls.__dataclass_fields__]), where=where)
        checked = {
            key: _checked_scaling(key, value, where) for key, value in rest.items() if value is not None
        }
        return cls(rope_type=RopeScalingType(kind), **checked)

    def to_mapping(self) -> dict[str, Any]:
        """The Hugging Face spelling, with only the keys that are set or differ from the paper's."""
        values: dict[str, Any] = {"rope_type": self.rope_type.value}
        for name, field in self.__dataclass_fields__.items():
            value = getattr(self, name)
            if name != "rope_type" and value is not None and (name == "factor" or value != field.default):
                values[name] = list(value) if isinstance(value, tuple) else value
        return values


_NEEDED: Final[Mapping[RopeScalingType, tuple[str, ...]]] = {
    RopeScalingType.LLAMA3: ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    RopeScalingType.YARN: ("original_max_position_embeddings",),
    RopeScalingType.LONGROPE: ("original_max_position_embeddings",),
}
"""What a type states as a positive number, besides the factor."""


def refuse_key(
    key: str, value: object, expected: str, *, where: str | Path | None = None
) -> ArchitectureRefused:
    """A refusal of one architecture key, with the value found and what it should have been."""
    return ArchitectureRefused(
        f"{key} is {value!r}",
        where=where,
        expected=expected,
        remedy="correct the architecture keys, or import the model again from its original",
        falsifier=INCOMPLETE_METADATA,
    )


def one_of(names: Sequence[str]) -> str:
    """The names of a choice, in words."""
    return f"one of {', '.join(names)}"


def _checked_scaling(key: str, value: Any, where: str | Path) -> Any:
    kinds: dict[str, type] = {"truncate": bool, "original_max_position_embeddings": int}
    if key in ("short_factor", "long_factor"):
        if not isinstance(value, list | tuple) or not all(type(one) in (int, float) for one in value):
            raise refuse_key(f"rope_scaling.{key}", value, "a list of numbers", where=where)
        return tuple(map(float, value))
    kind = kinds.get(key, float)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise refuse_key(f"rope_scaling.{key}", value, f"a value of type {kind.__name__}", where=where)
    return value
