"""Python's cyclic garbage collector, kept out of training steps.

A collection walks every object there is, at a moment of its own choosing; on many ranks all wait for the
one that collects. So what lives before training is set aside, and the rest is collected when asked.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collected_on_request() -> Iterator[None]:
    """While entered nothing is collected but by ``collect``."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def collect() -> None:
    """Collect what has become garbage since training began."""
    gc.collect()
