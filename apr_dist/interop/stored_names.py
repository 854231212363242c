"""Which of a source's tensors belong to the model, and under which name: prefixes and buffers left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from apr_dist.errors import WeightsRefused
from apr_dist.gates.names import ROTARY_BUFFER, plain_names

_ROUNDING = 0.01  # of a buffer that was rounded to bfloat16


def model_names(
    stored: Iterable[str],
    *,
    rope_theta: float | None,
    values: Callable[[str], npt.NDArray[np.float32]],
    where: Path,
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Plain name of every stored tensor that belongs to the model, and notes on what was changed.

    Args:
        stored: names as they are stored.
        rope_theta: base of the rotary frequencies, where it is known.
        values: reads a stored tensor.
        where: what a refusal names.

    Raises:
        WeightsRefused: a rotary buffer holds other frequencies than ``rope_theta`` gives.
    """
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
    return plain, tuple(notes)


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
