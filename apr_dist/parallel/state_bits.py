"""Which moments of AdamW are kept in 8 bits, and where they can be; what does it is ``eight_bit``.

Imports no PyTorch: a refusal of it takes a moment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec

from apr_dist.choices import Offload, Strategy
from apr_dist.errors import UsageError

BLOCK = 256
"""Elements that share a scale; the library's kernels know no other number."""

LEAST_ELEMENTS = 4096
"""Of a tensor as a whole; smaller ones keep 32 bits, as is the library's own rule."""

FLAG = "--optimizer.state-bits"

_EMBEDDING = "model.embed_tokens.weight"


def is_eligible(name: str, shape: Sequence[int]) -> bool:
    """Whether this parameter, of this shape as a whole, has 8-bit moments where they are asked for.

    The embedding never has: rows of rare tokens have moments unlike those of their neighbours in a block.
    """
    return name != _EMBEDDING and len(shape) >= 2 and math.prod(shape) >= LEAST_ELEMENTS


def can_have(strategy: Strategy, offload: Offload) -> bool:
    """Whether the strategy leaves each parameter a state of its own, which our optimizer updates."""
    return not strategy.zero_stage and offload is not Offload.OPTIMIZER_AND_PARAMETERS


def check_installed(state_bits: int) -> None:
    """Refuse 8 bits where the library is missing, before anything is loaded.

    Raises:
        UsageError: naming the command that installs it.
    """
    if state_bits == 8 and find_spec("bitsandbytes") is None:
        raise UsageError(
            "optimizer.state_bits is 8 and bitsandbytes is not installed",
            where=FLAG,
            expected="the extra that updates 8-bit state",
            remedy="pip install 'apr-dist[bitsandbytes]'",
        )


def refuse_state_bits(strategy: Strategy, offload: Offload, state_bits: int) -> None:
    """Keep moments in 8 bits only where the strategy can.

    Raises:
        UsageError: naming the strategies that can.
    """
    if state_bits == 8 and not can_have(strategy, offload):
        beside = f" with {offload} offloaded" if offload is not Offload.NONE else ""
        raise UsageError(
            f"optimizer.state_bits is 8 under strategy {strategy}{beside}",
            where=FLAG,
            expected="one process, ddp, fsdp2, shard-grad-op or hsdp, and no parameters offloaded",
            remedy="use fsdp2, which cuts the state over the processes, or 32 bits",
        )
