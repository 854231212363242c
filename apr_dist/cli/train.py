"""The verb that trains; it takes the trainer's own flags."""

from __future__ import annotations

from collections.abc import Sequence


def train(arguments: Sequence[str]) -> int:
    """Train a model in this process; a launcher starts several.

    Example: apr-dist train --config configs/demo.yaml --init model.apr
    """
    from apr_dist.train import leave, main  # noqa: PLC0415  (opens the compiled loader)

    leave(main(arguments, prog="apr-dist train"))
