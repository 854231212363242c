"""Our step and a hand-written loop of the same strategy, alternating in the same processes.

``bench_distributed.py --overhead`` starts it. Ours is a step as the trainer takes and reads it; the other is
plain PyTorch: DDP, or ``fully_shard`` over each block and the whole, fused AdamW, ``clip_grad_norm_``, and
the loss of its rank. Both begin with the same weights and see the same batches.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from apr_dist.model.config import TransformerConfig, preset
from apr_dist.model.transformer import Decoder
from apr_dist.parallel import runtime as processes
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.weights import draw_weights
from apr_dist.training.library import without_gates
from apr_dist.training.session import Session

LAYERS, VOCABULARY = 8, 8192
"""Of the shape that is measured: enough of it for a step of a second."""

BATCH, SEQ = 2, 128
"""Sequences of a rank and step, and their tokens."""

LR, WEIGHT_DECAY, BETAS, EPS, CLIP = 1e-4, 0.01, (0.9, 0.999), 1e-8, 1.0

Step = Callable[[int], float]
"""Takes step ``k`` and returns a loss: of the global batch for ours, of this rank for the other."""


def global_batches(config: TransformerConfig, world_size: int) -> Iterator[torch.Tensor]:
    """Random tokens, int32 ``[BATCH * world_size, SEQ + 1]``, without an end; the same for each caller."""
    generator = torch.Generator().manual_seed(0)
    while True:
        shape = (BATCH * world_size, SEQ + 1)
        yield torch.randint(config.vocab_size, shape, generator=generator, dtype=torch.int32)


def open_ours(config: TransformerConfig, strategy: str) -> Session:
    world_size = int(os.environ["WORLD_SIZE"])
    opened = without_gates(
        config,
        batches=global_batches(config, world_size),
        batch_size=BATCH * world_size,
        seq_length=SEQ,
        num_steps=sys.maxsize,
        lr=LR,
        warmup_steps=0,
        seed=0,
        device="cpu",
        optimizer={
            "weight_decay": WEIGHT_DECAY,
            "beta1": BETAS[0],
            "beta2": BETAS[1],
            "eps": EPS,
            "grad_clip": CLIP,
            "schedule": "constant",
        },
        parallel={"strategy": strategy, "cpu_threads": 1, "timeout_s": 600},
    )
    return Session(*opened)


def our_step(session: Session) -> Step:
    def step(k: int) -> float:
        session.stepper.take(k, compare=False, more=True)
        (taken,) = session.stepper.read()
        session.recorder.judge(taken, 0.0)
        return taken.train_loss

    return step


def plain_step(config: TransformerConfig, runtime: Runtime) -> Step:
    with torch.device("meta"):
        decoder = Decoder(config)
    if runtime.strategy.is_fsdp:
        for block in decoder.model.layers:
            fully_shard(block)
        fully_shard(decoder)
    decoder.to_empty(device="cpu")
    decoder.reset_buffers()
    draw_weights(decoder, config, runtime, seed=0)
    network: nn.Module = decoder if runtime.strategy.is_fsdp else DistributedDataParallel(decoder)
    matrices = [weight for weight in decoder.parameters() if weight.dim() >= 2]
    vectors = [weight for weight in decoder.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)
    batches = global_batches(config, runtime.world_size)
    network.train()

    def step(_: int) -> float:
        tokens = torch.chunk(next(batches), runtime.world_size)[runtime.rank].long()
        loss_sum, _ = network(tokens[:, :-1], tokens[:, 1:])
        loss = loss_sum / (BATCH * SEQ)
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def worker(options: argparse.Namespace) -> None:
    """Alternate both in this rank, and write the seconds of each step."""
    config = replace(preset(options.shape), num_layers=LAYERS, vocab_size=VOCABULARY)
    session = open_ours(config, options.worker)
    runtime = session.runtime
    steps = {"ours": our_step(session), "plain": plain_step(config, runtime)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for k in range(options.steps + 2):
        for name in sorted(steps, reverse=bool(k % 2)):  # neither is always the one that goes first
            runtime.barrier()
            began = time.perf_counter()
            losses[name].append(steps[name](k))
            if k >= 2:  # the first ones allocate
                seconds[name].append(time.perf_counter() - began)
    mean = runtime.sum(torch.tensor(losses["plain"], dtype=torch.float64)) / runtime.world_size
    for ours, plain in zip(losses["ours"], mean.tolist(), strict=True):
        if not math.isclose(ours, plain, rel_tol=1e-4):
            raise SystemExit(f"the loops differ: losses {ours} and {plain}")
    (options.output / f"{runtime.rank}.json").write_text(json.dumps(seconds))
    runtime.barrier()
    processes.shut_down(0)


def ratios(ranks: list[dict[str, Any]]) -> tuple[list[float], list[float], list[float]]:
    """Seconds of the slowest rank by step: ours, the other, and ours over the other."""
    ours, plain = (
        [max(values) for values in zip(*(rank[name] for rank in ranks), strict=True)]
        for name in ("ours", "plain")
    )
    return ours, plain, [one / other for one, other in zip(ours, plain, strict=True)]
