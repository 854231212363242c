"""What two ranks do under every strategy, in one pair of processes: run under torchrun, reports JSON.

torchrun --nproc_per_node 2 tests/builders/ranks.py MODEL.apr OUTPUT_FOLDER
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apr_dist.apr.reader import AprReader
from apr_dist.choices import ActivationCheckpointing, Strategy
from apr_dist.config.sections import GuardsSection
from apr_dist.errors import NumericalInstability, OutputError, WeightsRefused
from apr_dist.model.config import TransformerConfig
from apr_dist.parallel import runtime as processes
from apr_dist.parallel.gather import save_weights, weight_parts
from apr_dist.parallel.save_group import Exchange
from apr_dist.parallel.sharding import assert_spread
from apr_dist.parallel.weights import load_weights, model_digest, prove_weights
from apr_dist.runs.progress import GuardState
from apr_dist.training.session import Session
from apr_dist.training.step_guard import SkipStep, StepGuard
from builders.sessions import architecture_of, open_alone

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


def open_case(model: TransformerConfig | Path, strategy: Strategy, size: int, **settings: Any) -> Session:
    """A session of one sequence a micro-batch."""
    return open_alone(
        model,
        strategy,
        shard_size=size,
        batch_size=BATCH,
        micro_batch_size=1,
        seq_length=LENGTH,
        lr=1e-3,
        optimizer={"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 0.5},
        **settings,
    )


def take_steps(model: Path, strategy: Strategy, size: int, folder: Path) -> dict[str, Any]:
    """Load, step twice over two micro-batches a rank, refuse a bad step, and save; every rank calls this."""
    with open_case(model, strategy, size) as session:
        return _take_steps(session, f"{strategy}-{size}", folder)


def _take_steps(session: Session, name: str, folder: Path) -> dict[str, Any]:
    decoder, view = session.model, session.runtime
    found: dict[str, Any] = {"loaded": model_digest(decoder, view), "losses": [], "norms": []}
    found |= {**session.engine.evidence, "strategy": view.strategy.value}
    for step in range(STEPS):
        loss, norm = one_step(session, step)
        found["losses"].append(loss)
        found["norms"].append(norm)
    before = model_digest(decoder, view)
    try:
        one_step(session, STEPS, scale=math.nan)
    except NumericalInstability as error:
        found["refused"] = error.falsifier
    found["untouched"] = model_digest(decoder, view) == before
    target = folder / f"{name}.apr"
    metadata, exchange = session.start.metadata, Exchange(view)
    parts = weight_parts(decoder, view)
    save_weights(parts, target, metadata, overwrite=False, exchange=exchange)
    found["saved"] = str(target)
    try:
        save_weights(parts, target, metadata, overwrite=False, exchange=exchange)
    except OutputError:
        found["kept_the_first"] = True
    if name in SKIPPING:  # last, since it takes one step more
        found["skipped"] = skip_steps(session)
    return found


SKIPPING = ("single-1", "fsdp2-2", "zero1-1", "zero3-2")
"""Cases that also skip steps: one of each engine and each way DeepSpeed takes a step."""


def skip_steps(session: Session) -> dict[str, Any]:
    """Skip a step that is not finite and one that is a spike, then take that one after all."""
    options = GuardsSection.model_validate({"on_nonfinite": "skip", "on_spike": "skip", "spike_window": 2})
    guard = StepGuard(options, batch_size=BATCH, state=GuardState(recent=[1e-6, 1e-6]))
    before, norms = model_digest(session.model, session.runtime), []
    for scale in (math.nan, 1.0):
        try:
            one_step(session, STEPS, scale=scale, guard=guard)
        except SkipStep as skipped:
            norms.append(skipped.facts["grad_norm"])
    untouched = model_digest(session.model, session.runtime) == before
    _, norm = one_step(session, STEPS)
    return {
        "untouched": untouched,
        "skipped": guard.state.skipped,
        "norms": norms,
        "norm_when_taken": norm,
        "moved": model_digest(session.model, session.runtime) != before,
    }


def one_step(
    session: Session, step: int, *, scale: float = 1.0, guard: StepGuard | None = None
) -> tuple[float, float]:
    """One step of the engine over global batch ``step``; a scale of NaN makes its gradients so."""
    engine, view = session.engine, session.runtime
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(session.start.model_config.vocab_size, (BATCH, LENGTH + 1), generator=generator)
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


def compiled_steps(config: TransformerConfig, strategy: Strategy, size: int) -> dict[str, Any]:
    """Losses and norms as they are, and compiled with each kind of checkpointing; graphs by step."""
    found: dict[str, Any] = {}
    together = [
        mode.value for mode in ActivationCheckpointing if mode.value != "full-offload"
    ]  # not compiled
    for name, mode in (("as it is", "off"), *((mode, mode) for mode in together)):
        compute = {"activation_checkpointing": mode}
        with open_case(config, strategy, size, seed=5, compute=compute) as session:
            if name != "as it is":
                torch.compiler.reset()
                counters.clear()
                session.model.compile_blocks(backend="aot_eager")
            steps, graphs = [], []
            for step in range(4):
                steps.append(one_step(session, step))
                graphs.append(counters["stats"]["unique_graphs"])
        breaks = sum(counters["graph_break"].values())
        found[name] = {"steps": steps, "graphs": graphs, "breaks": breaks}
    return found


def gradient_memories(config: TransformerConfig) -> list[int]:
    """How many pieces of memory DDP's gradients lie in after a backward, and how many gradients there are."""
    with open_case(config, Strategy.DDP, 1) as session:
        tokens = torch.arange(LENGTH + 1)[None]
        for last in (False, True):
            session.engine.accumulate(tokens[:, :-1], tokens[:, 1:], scale=1.0, last=last)
        gradients = [weight.grad for weight in session.model.parameters() if weight.grad is not None]
        return [len({gradient.untyped_storage().data_ptr() for gradient in gradients}), len(gradients)]


def damage(model: Path) -> str:
    """Alter one element of rank 1's shard after loading, and let every rank look."""
    with open_case(model, Strategy.FSDP2, 2) as session, AprReader(model) as reader:
        decoder, view = session.model, session.runtime
        digests = load_weights(decoder, reader if view.is_main else None, view)
        if not view.is_main:
            with torch.no_grad():
                decoder.get_parameter("model.layers.1.mlp.up_proj.weight").to_local()[0, 0] += 1e-3
        try:
            prove_weights(decoder, digests, view)
        except WeightsRefused as error:
            return str(error)
        return "not noticed"


def drawn(config: TransformerConfig, strategy: Strategy, size: int) -> str:
    """Digest of a decoder from scratch whose embedding does not divide into equal parts."""
    with open_case(replace(config, vocab_size=511), strategy, size, seed=5) as session:
        assert_spread(session.model, session.runtime)
        return model_digest(session.model, session.runtime)


def main() -> None:
    model, folder = Path(sys.argv[1]), Path(sys.argv[2])
    cases = [case for case in CASES if "--no-deepspeed" not in sys.argv or not case[0].zero_stage]
    report: dict[str, Any] = {}
    for strategy, size in cases:
        report[f"{strategy}-{size}"] = take_steps(model, strategy, size, folder)
    config = architecture_of(model)
    report["drawn"] = drawn(config, Strategy.FSDP2, 2)
    possible = {Strategy.DDP, *dict(cases)}
    compiled = [case for case in COMPILED if case[0] in possible]
    report["compiled"] = {one.value: compiled_steps(config, one, size) for one, size in compiled}
    report["gradient memories"] = gradient_memories(config)
    report["damage"] = damage(model)
    (folder / f"report-{torch.distributed.get_rank()}.json").write_text(json.dumps(report))
    torch.distributed.barrier()
    processes.shut_down(0)


if __name__ == "__main__":
    main()
