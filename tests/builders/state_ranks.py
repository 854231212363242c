"""What two ranks hold between steps, under each strategy and offload: run under torchrun, reports JSON.

torchrun --nproc_per_node 2 tests/builders/state_ranks.py OUTPUT_FOLDER
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from apr_dist.choices import Offload, Strategy
from apr_dist.parallel import runtime as processes
from apr_dist.parallel.engine import prepare
from apr_dist.parallel.runtime import reset_state
from apr_dist.parallel.sharding import build_decoder
from apr_dist.parallel.strategy import possible_offloads
from apr_dist.parallel.weights import draw_weights
from apr_dist.parallel.zero import BUCKET_ELEMENTS
from apr_dist.training.optimizer import build_optimizer
from builders.models import tiny_config

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


def state_bytes(strategy: Strategy, offload: Offload, state_bits: int = 32) -> int:
    """What one rank holds after a step, beside what was there before."""
    reset_state()
    runtime = processes.start(
        device="cpu",
        strategy=strategy.value,
        precision="f32",
        cpu_threads=1,
        timeout_s=120,
        offload=offload.value,
    )
    before = sum(held().values())
    decoder = build_decoder(SHAPE, runtime)
    draw_weights(decoder, SHAPE, runtime, seed=0)
    offloaded = strategy.zero_stage > 0 and offload is not Offload.NONE
    optimizer = build_optimizer(
        decoder,
        lr=1e-4,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        offloaded=offloaded,
        state_bits=state_bits,
    )
    engine = prepare(decoder, optimizer, runtime, micro_batch=1, grad_clip=1.0)
    tokens = torch.randint(SHAPE.vocab_size, (1, 33))
    for _ in range(2):
        engine.accumulate(tokens[:, :-1], tokens[:, 1:], scale=1 / 64, last=True)
        engine.step(torch.zeros((), dtype=torch.bool))
    return sum(held().values()) - before


def main() -> None:
    folder, report = Path(sys.argv[1]), {}
    for strategy, offload in CASES:
        if strategy.zero_stage and "--no-deepspeed" in sys.argv:
            continue
        report[f"{strategy} {offload}"] = state_bytes(strategy, offload)
    for strategy in EIGHT_BIT:
        report[f"{strategy} 8 bits"] = state_bytes(strategy, Offload.NONE, 8)
    rank = torch.distributed.get_rank()
    (folder / f"state-{rank}.json").write_text(json.dumps(report))
    torch.distributed.barrier()
    processes.shut_down(0)


if __name__ == "__main__":
    main()
