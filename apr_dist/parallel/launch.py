"""What the launcher told this process, read from the environment in one place and found to make sense.

Imports no PyTorch: a refusal of it takes a moment.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from apr_dist.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One process of a launch, as torchrun and ``accelerate launch`` describe it.

    Attributes:
        rank: this process, from 0.
        world_size: processes in all; 1 without a launcher.
        local_world_size: processes on this machine.
        restarts: how often the launcher started all of them again.
    """

    rank: int
    world_size: int
    local_world_size: int
    restarts: int

    def check_address(self) -> None:
        """Several processes have somewhere to meet.

        Raises:
            UsageError: the launcher named no address or port.
        """
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if self.world_size > 1 and missing:
            raise _refusal(
                f"WORLD_SIZE is {self.world_size} and {' and '.join(missing)} not set",
                "an address at which the processes meet",
            )


def read_launch() -> Launch:
    """This process's place in its launch.

    Raises:
        UsageError: a variable is no integer, or they contradict each other.
    """
    launch = Launch(
        rank=_integer("RANK", 0),
        world_size=_integer("WORLD_SIZE", 1, least=1),
        local_world_size=_integer("LOCAL_WORLD_SIZE", 1, least=1),
        restarts=_integer("TORCHELASTIC_RESTART_COUNT", 0),
    )
    if launch.rank >= launch.world_size:
        raise _refusal(
            f"RANK is {launch.rank} and WORLD_SIZE is {launch.world_size}", "a rank below the size"
        )
    if launch.local_world_size > launch.world_size:
        raise _refusal(
            f"LOCAL_WORLD_SIZE is {launch.local_world_size} and WORLD_SIZE is {launch.world_size}",
            "no more processes on one machine than in all",
        )
    return launch


def _integer(name: str, default: int, *, least: int = 0) -> int:
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise _refusal(f"{name} is {text[:100]!r}", f"an integer of at least {least}")
    return int(text)


def _refusal(what: str, expected: str) -> UsageError:
    return UsageError(
        what,
        where="the launcher's environment",
        expected=expected,
        remedy="start with torchrun or accelerate launch, or unset RANK and WORLD_SIZE for one process",
    )
