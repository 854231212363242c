"""What two ranks hold between steps, under each strategy and offload: run under torchrun, reports JSON.

torchrun --nproc_per_node 2 tests/builders/state_ranks.py OUTPUT_FOLDER
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from apr_dist.choices import Offload, Strategy
from apr_dist.parallel import runtime as processes
from apr_dist.parallel.strategy import possible_offloads
from apr_dist.parallel.zero import BUCKET_ELEMENTS
from builders.models import tiny_config
from builders.sessions import open_alone

SHAPE = tiny_config(
    vocab_size=1024, hidden_size=256, num_layers=4, num_kv_heads=4, head_dim=64, intermediate_size=1024
)
"""About 17 MB in f32."""

CASES = [
    (strategy, offload)
    for strategy in (Strategy.DDP, Strategy.FSDP2, Strategy.ZERO1, Strategy.ZERO2, Strategy.ZERO3)
    for offload in possible_offloads(strategy)
]


EIGHT_BIT = (Strategy.DDP, Strategy.FSDP2)
"""Strategies that also run with optimizer state in 8 bits."""


def held() -> dict[int, int]:
    """Bytes of every tensor's memory by its address; DeepSpeed's buckets, which no model fills, left out."""
    gc.collect()
    plain = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]  # not a DTensor's face
    storages = [one.untyped_storage() for one in plain if one.device.type == "cpu"]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return {address: size for address, size in sizes.items() if size < 4 * BUCKET_ELEMENTS}


ADAPTED = (Strategy.DDP, Strategy.FSDP2, Strategy.ZERO2)
"""Strategies that also run with an adapter, beside a base in 16 bits."""

ADAPTER = {"kind": "lora", "rank": 8, "targets": "all-linear", "base": {"bits": 16}}


def state_bytes(
    strategy: Strategy, offload: Offload, state_bits: int = 32, adapter: dict[str, Any] | None = None
) -> int:
    """What one rank holds after a step, beside what was there before."""
    before = sum(held().values())
    rows = torch.randint(SHAPE.vocab_size, (2, 33))
    with open_alone(
        SHAPE,
        strategy,
        parallel={"offload": offload.value},
        optimizer={"state_bits": state_bits, "weight_decay": 0.0},
        adapter=adapter or {},
        batches=[rows] * 2,
        batch_size=2,
        seq_length=32,
        lr=1e-4,
    ) as session:
        for step in range(2):
            session.stepper.take(step, compare=False, more=False)
        session.stepper.read()
        return sum(held().values()) - before


def main() -> None:
    folder, report = Path(sys.argv[1]), {}
    for strategy, offload in CASES:
        if strategy.zero_stage and "--no-deepspeed" in sys.argv:
            continue
        report[f"{strategy} {offload}"] = state_bytes(strategy, offload)
    for strategy in EIGHT_BIT:
        report[f"{strategy} 8 bits"] = state_bytes(strategy, Offload.NONE, 8)
    for strategy in ADAPTED:
        if not strategy.zero_stage or "--no-deepspeed" not in sys.argv:
            report[f"{strategy} adapter"] = state_bytes(strategy, Offload.NONE, adapter=ADAPTER)
    rank = torch.distributed.get_rank()
    (folder / f"state-{rank}.json").write_text(json.dumps(report))
    torch.distributed.barrier()
    processes.shut_down(0)


if __name__ == "__main__":
    main()
