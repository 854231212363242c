"""Between DeepSpeed's gradient norm and its update: the place where a step can still be left out.

DeepSpeed clips and updates in one call, and leaves the update out by itself when it finds an overflow. It
asks its loss scale in between, under every ZeRO stage; there the norm is compared, and a step that must not
happen is declared an overflow, whose gradients DeepSpeed then forgets as it always does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


class Veto:
    """Holds single steps of one DeepSpeed optimizer (ZeRO-1, -2 or -3, in f32)."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer, self._ask_scale = optimizer, optimizer._update_scale
        self._hold, self._limit, self._norm = False, math.inf, math.nan
        optimizer._update_scale = self._between

    def step(self, engine_step: Callable[[], Any], *, hold: bool, limit: float) -> float:
        """Take DeepSpeed's step, unless it is held or its norm is not finite or above ``limit``.

        Returns:
            the global norm before clipping.
        """
        self._hold, self._limit = hold, limit
        engine_step()
        return self._norm

    def _between(self, has_overflow: bool = False) -> None:
        self._norm = math.inf if has_overflow else self._global_norm()
        held = has_overflow or self._hold or not self._norm <= self._limit
        self._optimizer.overflow = held
        self._ask_scale(held)

    def _global_norm(self) -> float:
        if hasattr(self._optimizer, "scaled_global_norm"):  # stages 1 and 2
            norm = float(self._optimizer.scaled_global_norm())
        else:
            groups = [float(one) for one in self._optimizer._get_norm_groups()]
            norm = math.inf if min(groups) < 0 else math.hypot(*groups)  # an invalid one is given as -1
        return norm if norm >= 0 else math.inf
