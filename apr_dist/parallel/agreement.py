"""What ranks must agree on before the first step: the same settings, data, init, code and versions."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import torch

from apr_dist.errors import DistributedError
from apr_dist.parallel.runtime import Runtime

NOT_ONE_RUN = "FALSIFY-APR-DIST-DISTRIBUTED-024"
"""Falsifier of ranks that were started with different settings."""

_LONGEST = 1000
"""Characters of the note of the first rank that has one."""


def prove_same(facts: Mapping[str, str], runtime: Runtime) -> None:
    """Compare every rank's facts with rank 0's; a collective.

    Args:
        facts: this rank's values by name.
        runtime: this rank's view of the run.

    Raises:
        DistributedError: on every rank, naming the first rank that differs, with its host, and each
            difference.
    """
    main: dict[str, str] = runtime.broadcast_json(dict(facts))
    differ = [
        f"{name} is {facts.get(name, 'not set')} there and {main.get(name, 'not set')} on rank 0"
        for name in sorted(main.keys() | facts.keys())
        if main.get(name) != facts.get(name)
    ]
    note = f"rank {runtime.rank} on host {socket.gethostname()}: {'; '.join(differ)}" if differ else ""
    first, said = first_note(note, runtime)
    if not said:
        return
    error = DistributedError(
        f"the ranks were not started for the same run. {said}",
        expected="the same settings, data, init file, code and library versions on every rank",
        remedy="start every node with the same command, in the same environment",
        falsifier=NOT_ONE_RUN,
    )
    error.told_by_rank_0 = not runtime.is_main
    error.facts["failed_rank"] = first
    raise error


def first_note(note: str, runtime: Runtime) -> tuple[int, str]:
    """The lowest rank whose note is not empty, and that note, on every rank; a collective."""
    who = torch.zeros(runtime.world_size, dtype=torch.int32, device=runtime.device)
    who[runtime.rank] = bool(note)
    runtime.sum(who)
    if not who.any():
        return 0, ""
    first = int(who.nonzero()[0])
    text = torch.zeros(_LONGEST, dtype=torch.int32, device=runtime.device)
    if runtime.rank == first:
        codes = [ord(character) for character in note[:_LONGEST]]
        text[: len(codes)] = torch.tensor(codes, dtype=torch.int32, device=runtime.device)
    runtime.sum(text)
    return first, "".join(chr(code) for code in text.tolist() if code)
