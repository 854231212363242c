"""What the routers of a mixture do during a run: figures for its metrics, and experts that nobody uses.

For a dense model there is nothing to watch, and nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apr_dist.model.routing import Routing, RoutingFigures
from apr_dist.runs.display import Display

SAID = 8
"""Experts that a warning names."""


class ExpertWatch:
    """Figures of steps and evaluations, and a warning about every expert that got no token.

    Args:
        routing: of the decoder; None for a dense one.
        device: where it computes.
        display: what a person sees on rank 0.
    """

    def __init__(self, routing: Routing | None, device: torch.device, display: Display) -> None:
        self._routing, self._device, self._display = routing, device, display
        self._since: Tensor | None = None

    def sums(self) -> Tensor:
        """Sums of this rank's forwards since the last time, f64, to be summed over all ranks."""
        if self._routing is None:
            return torch.zeros(0, dtype=torch.float64, device=self._device)
        return self._routing.take_trained(self._device)

    def trained(self, sums: Sequence[float]) -> RoutingFigures | None:
        """Figures of one step's sums over all ranks."""
        if self._routing is None:
            return None
        here = torch.tensor(sums, dtype=torch.float64)
        self._since = here if self._since is None else self._since + here
        return self._routing.figures(here)

    def measured(self, found: RoutingFigures | None, *, step: int) -> dict[str, Any]:
        """What an evaluation line says of the routers; warns of experts that are not used.

        Args:
            found: figures of the held-out tokens.
            step: after which they were measured.
        """
        if self._routing is None or found is None:
            return {}
        since, self._since = self._since, None
        trained = None if since is None else self._routing.figures(since)
        unused = {"held-out": found.idle, "training": () if trained is None else trained.idle}
        for what, names in unused.items():
            if names:
                self._display.warn(_unused(names, what, self._routing, step))
        load = [[round(one, 4) for one in row] for row in found.load]
        facts = {"load": load, "idle_held_out": list(unused["held-out"])}
        return {"router": {**found.to_json(), **facts, "idle_trained": list(unused["training"])}}


def _unused(names: Sequence[str], what: str, routing: Routing, step: int) -> str:
    more = f" and {len(names) - SAID:,} more" if len(names) > SAID else ""
    effect = "" if what == "held-out" else " since the last evaluation, so nothing trained them"
    return (
        f"step {step}: {len(names):,} of {routing.layers * routing.experts:,} experts got no {what} token"
        f"{effect}: {', '.join(names[:SAID])}{more}"
    )
