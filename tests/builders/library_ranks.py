"""A program that trains with the library on every rank of a launcher: what it printed is what it found."""

from __future__ import annotations

import json
import sys

import torch

import apr_dist


def main() -> None:
    """Open a session, replace a weight, step, and say what every rank saw."""
    settings = json.loads(sys.argv[1])
    name = "model.layers.0.mlp.up_proj.weight"
    with apr_dist.open_session(**settings) as session:
        before = session.weight(name)
        new = torch.arange(before.numel(), dtype=torch.float32).view(before.shape) / before.numel() / 10
        session.set_weight(name, new)
        replaced = torch.equal(session.weight(name), new)
        first = session.evaluate().loss
        losses = [step.train_loss for step in session.steps()]
        moved = session.weight(name)
        session.save()
        found = {
            "strategy": session.runtime.strategy.value,
            "world_size": session.runtime.world_size,
            "replaced": replaced,
            "other": not torch.equal(before, new),
            "moved": 0 < float((moved - new).abs().max()) < 0.01,
            "first": first,
            "losses": losses,
        }
        main_rank = session.runtime.is_main
    if main_rank:
        print("FOUND " + json.dumps(found))


if __name__ == "__main__":
    main()
