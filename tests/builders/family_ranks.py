"""Two steps of a tiny model of every family under each strategy, in one pair of processes.

torchrun --nproc_per_node 2 tests/builders/family_ranks.py OUTPUT_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetensors.torch import save_file

from apr_dist.choices import Strategy
from apr_dist.model.families import Family
from apr_dist.parallel import runtime as processes
from builders.models import random_tokens, tiny_config
from builders.sessions import open_alone

STRATEGIES = (Strategy.DDP, Strategy.FSDP2, Strategy.ZERO3)
STEPS = 2


def trained(family: Family, strategy: Strategy) -> dict[str, torch.Tensor]:
    """Every weight after two steps over four sequences, one a micro-batch; a collective."""
    model = tiny_config(family)
    batches = [random_tokens(model, (4, 17), seed=seed) for seed in range(STEPS)]
    sizes = {"batch_size": 4, "micro_batch_size": 1, "seq_length": 16, "num_steps": STEPS, "lr": 1e-3}
    shard_size = 2 if strategy is not Strategy.DDP else 1
    with open_alone(model, strategy, shard_size=shard_size, batches=batches, **sizes) as session:
        for step in range(STEPS):
            session.stepper.take(step, compare=False, more=step + 1 < STEPS)
        return {name: session.weight(name).clone() for name in model.parameter_shapes()}


def main() -> None:
    """Save what the first rank has of each case as ``FAMILY-STRATEGY.safetensors``."""
    for strategy in STRATEGIES:
        for family in Family:
            weights = trained(family, strategy)
            if torch.distributed.get_rank() == 0:
                save_file(weights, Path(sys.argv[1]) / f"{family}-{strategy}.safetensors")
    torch.distributed.barrier()
    processes.shut_down(0)


if __name__ == "__main__":
    main()
