"""What two ranks do under every strategy, in one pair of processes: run under torchrun, reports JSON.

torchrun --nproc_per_node 2 tests/builders/ranks.py MODEL.apr OUTPUT_FOLDER
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from apr_dist.apr.reader import AprReader
from apr_dist.choices import Strategy
from apr_dist.config.sections import GuardsSection
from apr_dist.errors import NumericalInstability, OutputError, WeightsRefused
from apr_dist.model.checkpointing import Checkpointing
from apr_dist.model.config import TransformerConfig
from apr_dist.model.families import Family
from apr_dist.model.transformer import Decoder
from apr_dist.parallel import runtime as processes
from apr_dist.parallel.engine import Engine, prepare
from apr_dist.parallel.exchange import Exchange
from apr_dist.parallel.gather import save_weights, weight_parts
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.sharding import assert_spread, build_decoder
from apr_dist.parallel.weights import draw_weights, load_weights, model_digest, prove_weights
from apr_dist.runs.progress import GuardState
from apr_dist.training.optimizer import build_optimizer
from apr_dist.training.step_guard import SkipStep, StepGuard

CASES = (
    (Strategy.FSDP2, 2),
    (Strategy.SHARD_GRAD_OP, 2),
    (Strategy.HSDP, 1),
    (Strategy.HSDP, 2),
    (Strategy.ZERO1, 1),
    (Strategy.ZERO3, 2),
)
"""Strategies and how many ranks share a copy."""

COMPILED = ((Strategy.DDP, 1), (Strategy.FSDP2, 2), (Strategy.ZERO3, 2))
"""The same for those whose blocks are also compiled and checkpointed."""

STEPS, BATCH, LENGTH = 2, 4, 16


def take_steps(model: Path, view: Runtime, folder: Path) -> dict[str, Any]:
    """Load, step twice over two micro-batches a rank, refuse a bad step, and save; every rank calls this."""
    reader = AprReader(model)
    config = TransformerConfig.from_metadata(
        reader.metadata.to_mapping(), family=Family.QWEN2, where=model, tie_word_embeddings=True
    )
    decoder = build_decoder(config, view)
    load_weights(decoder, reader if view.is_main else None, view)
    loaded = model_digest(decoder, view)
    optimizer = build_optimizer(decoder, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    engine = prepare(decoder, optimizer, view, micro_batch=1, grad_clip=0.5)
    found: dict[str, Any] = {"loaded": loaded, **engine.evidence, "losses": [], "norms": []}
    for step in range(STEPS):
        loss, norm = one_step(engine, view, config.vocab_size, step, scale=1.0)
        found["losses"].append(loss)
        found["norms"].append(norm)
    before = model_digest(decoder, view)
    try:
        one_step(engine, view, config.vocab_size, STEPS, scale=math.nan)
    except NumericalInstability as error:
        found["refused"] = error.falsifier
    found["untouched"] = model_digest(decoder, view) == before
    target = folder / f"{view.strategy}-{view.shard_size}.apr"
    metadata, exchange = reader.metadata if view.is_main else None, Exchange(view)
    parts = weight_parts(decoder, view)
    save_weights(parts, target, metadata, overwrite=False, exchange=exchange)
    found["saved"] = str(target)
    try:
        save_weights(parts, target, metadata, overwrite=False, exchange=exchange)
    except OutputError:
        found["kept_the_first"] = True
    if name_of(view) in SKIPPING:  # last, since it takes one step more
        found["skipped"] = skip_steps(engine, view, config.vocab_size, lambda: model_digest(decoder, view))
    return found


SKIPPING = ("single-1", "fsdp2-2", "zero1-1", "zero3-2")
"""Cases that also skip steps: one of each engine and each way DeepSpeed takes a step."""


def name_of(view: Runtime) -> str:
    return f"{view.strategy}-{view.shard_size}"


def skip_steps(engine: Engine, view: Runtime, vocabulary: int, digest: Callable[[], str]) -> dict[str, Any]:
    """Skip a step that is not finite and one that is a spike, then take that one after all."""
    options = GuardsSection.model_validate({"on_nonfinite": "skip", "on_spike": "skip", "spike_window": 2})
    guard = StepGuard(options, batch_size=BATCH, state=GuardState(recent=[1e-6, 1e-6]))
    before, norms = digest(), []
    for scale in (math.nan, 1.0):
        try:
            one_step(engine, view, vocabulary, STEPS, scale=scale, guard=guard)
        except SkipStep as skipped:
            norms.append(skipped.facts["grad_norm"])
    untouched = digest() == before
    _, norm = one_step(engine, view, vocabulary, STEPS, scale=1.0)
    return {
        "untouched": untouched,
        "skipped": guard.state.skipped,
        "norms": norms,
        "norm_when_taken": norm,
        "moved": digest() != before,
    }


def one_step(
    engine: Engine, view: Runtime, vocabulary: int, step: int, *, scale: float, guard: StepGuard | None = None
) -> tuple[float, float]:
    """One step over global batch ``step``; a scale of NaN makes its gradients so."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(vocabulary, (BATCH, LENGTH + 1), generator=generator)
    mine = torch.chunk(rows, view.world_size)[view.rank]
    total = torch.zeros((), dtype=torch.float64)
    for index, row in enumerate(mine):
        total += engine.accumulate(
            row[None, :-1],
            row[None, 1:],
            scale=scale * view.world_size / (BATCH * LENGTH),
            last=index == len(mine) - 1,
        ).double()
    loss = float(view.sum(total)) / (BATCH * LENGTH)
    guard = guard or StepGuard(GuardsSection(), batch_size=BATCH, state=GuardState())
    norm = float(engine.step(torch.tensor(not math.isfinite(loss)), guard.limits()[1]))
    guard.check(batch=step, train_loss=loss, grad_norm=norm)
    return loss, norm


def compiled_steps(view: Runtime, config: TransformerConfig) -> dict[str, Any]:
    """Losses and norms as they are, and compiled with each kind of checkpointing; graphs by step."""
    found: dict[str, Any] = {}
    for name, mode in (("as it is", "off"), *((mode, mode) for mode in Checkpointing)):
        decoder: Decoder = build_decoder(config, view)
        draw_weights(decoder, config, view, seed=5)
        decoder.set_checkpointing(Checkpointing(mode))
        if name != "as it is":
            torch.compiler.reset()
            counters.clear()
            decoder.compile_blocks(backend="aot_eager")
        optimizer = build_optimizer(decoder, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
        engine = prepare(decoder, optimizer, view, micro_batch=1, grad_clip=0.5)
        steps, graphs = [], []
        for step in range(4):
            steps.append(one_step(engine, view, config.vocab_size, step, scale=1.0))
            graphs.append(counters["stats"]["unique_graphs"])
        found[name] = {"steps": steps, "graphs": graphs, "breaks": sum(counters["graph_break"].values())}
    return found


def gradient_memories(view: Runtime, config: TransformerConfig) -> list[int]:
    """How many pieces of memory DDP's gradients lie in after a backward, and how many gradients there are."""
    decoder = build_decoder(config, view)
    draw_weights(decoder, config, view, seed=5)
    optimizer = build_optimizer(decoder, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    engine = prepare(decoder, optimizer, view, micro_batch=1, grad_clip=0.5)
    tokens = torch.arange(LENGTH + 1)[None]
    for last in (False, True):
        engine.accumulate(tokens[:, :-1], tokens[:, 1:], scale=1.0, last=last)
    gradients = [weight.grad for weight in decoder.parameters() if weight.grad is not None]
    return [len({gradient.untyped_storage().data_ptr() for gradient in gradients}), len(gradients)]


def damage(model: Path, view: Runtime) -> str:
    """Alter one element of rank 1's shard after loading, and let every rank look."""
    reader = AprReader(model)
    config = TransformerConfig.from_metadata(
        reader.metadata.to_mapping(), family=Family.QWEN2, where=model, tie_word_embeddings=True
    )
    decoder = build_decoder(config, view)
    digests = load_weights(decoder, reader if view.is_main else None, view)
    if not view.is_main:
        with torch.no_grad():
            decoder.get_parameter("model.layers.1.mlp.up_proj.weight").to_local()[0, 0] += 1e-3
    try:
        prove_weights(decoder, digests, view)
    except WeightsRefused as error:
        return str(error)
    return "not noticed"


def drawn(view: Runtime, config: TransformerConfig) -> str:
    """Digest of a decoder from scratch whose embedding does not divide into equal parts."""
    config = replace(config, vocab_size=511)
    decoder: Decoder = build_decoder(config, view)
    draw_weights(decoder, config, view, seed=5)
    assert_spread(decoder, view)
    return model_digest(decoder, view)


def main() -> None:
    model, folder = Path(sys.argv[1]), Path(sys.argv[2])
    cases = [case for case in CASES if "--no-deepspeed" not in sys.argv or not case[0].zero_stage]
    first = "fsdp2" if "--no-deepspeed" in sys.argv else "zero3"
    runtime = processes.start(device="cpu", strategy=first, precision="f32", cpu_threads=1, timeout_s=120)
    report: dict[str, Any] = {}
    for strategy, size in cases:
        view = replace(runtime, strategy=strategy, shard_size=size)
        report[f"{strategy}-{size}"] = take_steps(model, view, folder)
    fsdp = replace(runtime, strategy=Strategy.FSDP2, shard_size=2)
    with AprReader(model) as reader:
        config = TransformerConfig.from_metadata(
            reader.metadata.to_mapping(), family=Family.QWEN2, where=model, tie_word_embeddings=True
        )
    report["drawn"] = drawn(fsdp, config)
    possible = {Strategy.DDP, *dict(cases)}
    compiled = [replace(runtime, strategy=one, shard_size=size) for one, size in COMPILED if one in possible]
    report["compiled"] = {view.strategy.value: compiled_steps(view, config) for view in compiled}
    ddp = replace(runtime, strategy=Strategy.DDP, shard_size=1)
    report["gradient memories"] = gradient_memories(ddp, config)
    report["damage"] = damage(model, fsdp)
    (folder / f"report-{runtime.rank}.json").write_text(json.dumps(report))
    runtime.barrier()
    processes.shut_down(0)


if __name__ == "__main__":
    main()
