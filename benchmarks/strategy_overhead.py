"""Our step and a hand-written loop of the same strategy, alternating in the same processes.

``bench_distributed.py --overhead`` starts it. Ours is a step as the trainer takes and reads it; the other is
plain PyTorch: DDP, or ``fully_shard`` over each block and the whole, fused AdamW, ``clip_grad_norm_``, and
the loss of its rank. Both begin with the same weights and see the same batches.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from apr_dist.config.sections import GuardsSection
from apr_dist.data.documents import Documents
from apr_dist.data.mixture import Progress
from apr_dist.model.config import TransformerConfig, preset
from apr_dist.model.transformer import Decoder
from apr_dist.parallel import runtime as processes
from apr_dist.parallel.engine import prepare
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.sharding import build_decoder
from apr_dist.parallel.weights import draw_weights
from apr_dist.runs.progress import GuardState
from apr_dist.training.optimizer import build_optimizer
from apr_dist.training.step_guard import StepGuard
from apr_dist.training.stepping import BatchFeed, Stepper

LAYERS, VOCABULARY = 8, 8192
"""Of the shape that is measured: enough of it for a step of a second."""

BATCH, SEQ = 2, 128
"""Sequences of a rank and step, and their tokens."""

LR, WEIGHT_DECAY, BETAS, EPS, CLIP = 1e-4, 0.01, (0.9, 0.999), 1e-8, 1.0

Step = Callable[[int], float]
"""Takes step ``k`` and returns a loss: of the global batch for ours, of this rank for the other."""


class Drawn:
    """Global batches of random tokens by number, this rank's part; the same for both."""

    def __init__(self, config: TransformerConfig, runtime: Runtime) -> None:
        self._config, self._rank = config, runtime.rank

    def batch(self, k: int) -> list[torch.Tensor]:
        """One micro-batch, int32 ``[BATCH, SEQ + 1]``."""
        generator = torch.Generator().manual_seed(1000 * k + self._rank)
        shape = (BATCH, SEQ + 1)
        return [torch.randint(self._config.vocab_size, shape, generator=generator, dtype=torch.int32)]

    def progress(self, batches: int) -> dict[str, Progress]:  # noqa: ARG002
        """No source is counted."""
        return {}

    def documents(self, k: int) -> list[Documents]:  # noqa: ARG002
        """None: tokens are not packed."""
        return []


def our_step(config: TransformerConfig, runtime: Runtime) -> Step:
    decoder = build_decoder(config, runtime)
    draw_weights(decoder, config, runtime, seed=0)
    optimizer = build_optimizer(decoder, lr=LR, weight_decay=WEIGHT_DECAY, betas=BETAS, eps=EPS)
    stepper = Stepper(
        engine=prepare(decoder, optimizer, runtime, micro_batch=BATCH, grad_clip=CLIP),
        runtime=runtime,
        feed=BatchFeed(Drawn(config, runtime), runtime.device),
        lr_at=lambda _: LR,
        global_tokens=BATCH * SEQ * runtime.world_size,
        notes=lambda: torch.zeros(3, dtype=torch.float64),
    )

    guard = StepGuard(GuardsSection(), batch_size=BATCH * runtime.world_size, state=GuardState())

    def step(k: int) -> float:
        stepper.take(k, compare=False, more=True)
        (taken,) = stepper.read()
        guard.check(batch=k, train_loss=taken.train_loss, grad_norm=taken.grad_norm)
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
    data = Drawn(config, runtime)
    network.train()

    def step(k: int) -> float:
        (rows,) = data.batch(k)
        tokens = rows.long()
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
    runtime = processes.start(
        device="cpu", strategy=options.worker, precision="f32", cpu_threads=1, timeout_s=600
    )
    config = replace(preset(options.shape), num_layers=LAYERS, vocab_size=VOCABULARY)
    steps = {"ours": our_step(config, runtime), "plain": plain_step(config, runtime)}
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
