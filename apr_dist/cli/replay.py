"""The verb that looks at one step of a run again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro


def replay(
    run_dir: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    step: int | None = None,
    device: str | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Compute one step of a run again and name the sequence that made it what it was.

    Example: apr-dist replay runs/first --step 1200

    Args:
        run_dir: run folder; the data and the init it names must still be there.
        step: step, counted from 1; by default the one the run was refused for.
        device: auto, cpu or cuda; by default as the run.
        as_json: print JSON.
    """
    from apr_dist.training.replay import replay as compute  # noqa: PLC0415  (imports PyTorch)

    found = compute(run_dir, step=step, device=device, say=(lambda _: None) if as_json else print)
    if as_json:
        facts = asdict(found) | {"culprits": [one.number for one in found.culprits]}
        print(json.dumps(_plain(facts), indent=2))
        return
    print(f"step {found.step}: loss {found.loss:.6g}, gradient norm {found.grad_norm:.6g}")
    if found.recorded:
        recorded = found.recorded
        print(f"recorded ({recorded['kind']}): loss {recorded['train_loss']}, norm {recorded['grad_norm']}")
    for one in found.sequences:
        mark = "*" if one in found.culprits else " "
        print(f"{mark} sequence {one.number:>8}  loss {one.loss:<12.6g} gradient norm {one.grad_norm:.6g}")
    for one in found.culprits:
        print(f"sequence {one.number}: " + (repr(one.text) if one.text else "(no tokenizer to read it with)"))


def _plain(value: object) -> object:
    """JSON has no NaN: figures that are not finite as text."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value
