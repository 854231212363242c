"""The error of processes that do not all meet: who is missing, and what to check."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import torch.distributed as dist

from apr_dist.errors import DistributedError
from apr_dist.parallel.launch import Launch
from apr_dist.parallel.strategy import NOT_AS_ASKED

_PORT_IN_USE = re.compile("EADDRINUSE|address already in use", re.IGNORECASE)
_CAME = re.compile(r"(\d+)/\d+ clients joined")


@contextlib.contextmanager
def meeting(launch: Launch, timeout_s: float) -> Iterator[None]:
    """Raise what PyTorch raises while processes join as an error that names what to check.

    Args:
        launch: this process among the others.
        timeout_s: how long they may take to meet, in seconds.

    Raises:
        DistributedError: not all processes came, rank 0 was not reached, or its port is in use.
    """
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if launch.world_size == 1:
            raise
        raise _as_error(str(error), launch, timeout_s) from error


def _as_error(text: str, launch: Launch, timeout_s: float) -> DistributedError:
    world, address = launch.world_size, f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if _PORT_IN_USE.search(text):
        return DistributedError(
            f"the port of {address} is in use",
            expected=f"a free port at which {world} processes meet",
            remedy="end the run that uses it, or start every process with another MASTER_PORT",
            falsifier=NOT_AS_ASKED,
        )
    came = _CAME.search(text)
    if came:
        what = f"{came[1]} of {world} processes came to {address} in {timeout_s:g} s"
    elif launch.rank:
        what = f"rank {launch.rank} of {world} did not reach the others at {address} in {timeout_s:g} s"
    else:
        what = f"not all of {world} processes came to {address} ({' '.join(text.split())[:300]})"
    return DistributedError(
        what,
        expected=f"{world} processes, each with its own RANK from 0 to {world - 1}",
        remedy="check that every machine was started, with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE,"
        " and that the port is open between them; if one only starts late, raise --parallel.timeout-s;"
        " to train with one process, unset RANK and WORLD_SIZE",
        falsifier=NOT_AS_ASKED,
    )
