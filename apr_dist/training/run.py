"""One run from proven inputs to a verdict: processes, weights, data, the loop, what it leaves behind."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from apr_dist import __version__
from apr_dist.atomic_files import write_atomically
from apr_dist.config import TrainConfig
from apr_dist.config_sections import Precision
from apr_dist.contracts.evidence import package_digest
from apr_dist.cores import has_bf16_arithmetic
from apr_dist.errors import AprDistError, DistributedError, OutputError
from apr_dist.gates.output import create_run_dir
from apr_dist.gates.preflight import Preflight
from apr_dist.gates.result import GateResult
from apr_dist.model.config import TransformerConfig
from apr_dist.model.families import Family
from apr_dist.model.transformer import Decoder
from apr_dist.parallel import runtime as processes
from apr_dist.parallel.exchange import Exchange
from apr_dist.parallel.run_folder import prove_shared
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.state import restore
from apr_dist.parallel.watch import Watch
from apr_dist.parallel.whereabouts import HERE, Phase
from apr_dist.training.aborts import AbortRecord
from apr_dist.training.arrival import Weights, build_model
from apr_dist.training.checkpoint import json_bytes
from apr_dist.training.compute import set_up_machine
from apr_dist.training.display import Display
from apr_dist.training.metrics import MetricsFile
from apr_dist.training.progress import Start
from apr_dist.training.resume import ResumePoint, flat
from apr_dist.training.run_data import open_data
from apr_dist.training.run_log import LOG_NAME, RunLog
from apr_dist.training.saving import Saver
from apr_dist.training.step_folders import CHECKPOINT_NAME, SavedState
from apr_dist.training.trackers import Trackers
from apr_dist.training.trainer import Trainer
from apr_dist.training.verdict import Verdict

CONFIG_NAME = "config.yaml"
METRICS_NAME = "metrics.jsonl"
VERDICT_NAME = "verdict.json"


def execute(
    config: TrainConfig,
    preflight: Preflight | None,
    point: ResumePoint | None,
    refusal: AprDistError | None,
    display: Display,
    watch: Watch,
) -> Verdict:
    """Start the processes, let all of them know what rank 0 found, train, and judge.

    Args:
        config: the resolved configuration.
        preflight: rank 0's proven inputs; None on other ranks, and where it was refused.
        point: the step folder to go on from, on rank 0; None begins at step 0.
        refusal: rank 0's refusal, raised on every rank.
        display: what a person sees on rank 0.
        watch: ends every rank when one fails or all stand still.

    Raises:
        AprDistError: on every rank alike, for whatever rank 0 refused.
    """
    options = config.parallel
    HERE.enter(Phase.JOINING)
    runtime = processes.start(
        device=config.device,
        strategy=options.strategy,
        precision=options.precision,
        cpu_threads=options.cpu_threads,
        timeout_s=options.timeout_s,
        shard_size=options.shard_size,
        offload=options.offload,
        state_bits=config.optimizer.state_bits,
    )
    _watch_all(watch, runtime, hang_s=options.hang_s)
    runtime.agree(refusal)
    HERE.enter(Phase.LOADING)
    facts = runtime.broadcast_json(None if preflight is None else _shared(preflight, point))
    model_config = TransformerConfig.from_metadata(
        facts["architecture"],
        family=Family(facts["family"]),
        where="rank 0",
        tie_word_embeddings=facts["tied"],
    )
    _say_how(config, runtime, display)
    resumed = SavedState(**facts["resumed"]) if facts["resumed"] else None
    prove_shared(config.run_dir, runtime)
    runtime.on_main(lambda: _open_run_dir(config, display, fresh=resumed is None))
    began = time.perf_counter()
    reader = preflight.reader if preflight else None
    weights = Weights(
        reader=reader, named=facts["weights_from"], compared=config.init is not None and resumed is None
    )
    model, arrived, random_start = build_model(config, model_config, weights, runtime, display)
    start = Start(
        model_config=model_config,
        from_init=config.init is not None,
        metadata=reader.metadata if reader else None,
        provenance={
            **facts["provenance"],
            "tool_version": __version__,
            "code_digest": package_digest(),
            "seed": config.seed,
        },
        recorded_val_loss=facts["recorded_val_loss"],
        random_start=random_start,
    )
    session = _Session(
        config=config,
        runtime=runtime,
        model=model,
        start=start,
        results=[GateResult(**gate) for gate in facts["gates"]] + [arrived],
        resumed=resumed,
        step_folder=Path(facts["step_folder"]) if facts["step_folder"] else None,
        load_s=time.perf_counter() - began,
        display=display,
    )
    return _train(session, watch)


def _watch_all(watch: Watch, runtime: Runtime, *, hang_s: float) -> None:
    """Connect the watches of all ranks, or none of them trains."""
    error = None
    try:
        watch.join(world_size=runtime.world_size, hang_s=hang_s, tell_all=runtime.broadcast_json)
    except DistributedError as raised:
        error = raised
    cut_off = int(runtime.sum(torch.tensor([error is not None], device=runtime.device).float()).item())
    if cut_off:
        raise error or DistributedError(
            f"{cut_off} of {runtime.world_size} ranks cannot reach rank 0",
            expected="TCP connections between the hosts, on any port",
            remedy="see what those ranks print",
        )


def _say_how(config: TrainConfig, runtime: Runtime, say: Display) -> None:
    """The choices that were made for this machine, in one line."""
    say(f"running on {set_up_machine(config, runtime)}")
    bf16 = config.parallel.precision is Precision.BF16
    if bf16 and runtime.device.type == "cpu" and not has_bf16_arithmetic():
        say.warn("this processor has no bf16 arithmetic: a step takes longer in bf16 than in f32")


@dataclass(frozen=True, kw_only=True)
class _Session:
    """What one run holds while it trains.

    ``step_folder`` is the one it goes on from, on every rank; ``load_s`` what building the network took.
    """

    config: TrainConfig
    runtime: Runtime
    model: Decoder
    start: Start
    results: list[GateResult]
    resumed: SavedState | None
    step_folder: Path | None
    load_s: float
    display: Display


def _shared(preflight: Preflight, point: ResumePoint | None) -> dict[str, Any]:
    config = preflight.model_config
    return {
        "architecture": config.to_metadata(),
        "family": config.family.value,
        "tied": config.tie_word_embeddings,
        "gates": [result.to_json() for result in preflight.results],
        "provenance": preflight.provenance,
        "recorded_val_loss": preflight.recorded_val_loss,
        "resumed": asdict(point.state) if point else None,
        "step_folder": str(point.folder.absolute()) if point else None,
        "weights_from": str(preflight.reader.path) if preflight.reader else None,
    }


def _open_run_dir(config: TrainConfig, display: Display, *, fresh: bool) -> None:
    create_run_dir(config.run_dir)
    if isinstance(display, RunLog):
        display.keep_in(config.run_dir / LOG_NAME, append=not fresh)
    for name in (VERDICT_NAME, METRICS_NAME) if fresh else (VERDICT_NAME,):
        try:
            (config.run_dir / name).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot be replaced ({error.strerror})", where=config.run_dir / name
            ) from error
    write_atomically(config.run_dir / CONFIG_NAME, config.to_yaml().encode())


def _train(session: _Session, watch: Watch) -> Verdict:
    config, runtime, start = session.config, session.runtime, session.start
    aborts = AbortRecord(
        config.run_dir / VERDICT_NAME if runtime.is_main else None,
        gates=session.results,
        provenance=start.provenance,
        synthetic=config.synthetic,
    )
    watch.on_failure = aborts.of_failure
    with contextlib.ExitStack() as stack:
        try:
            trainer = _trainer(session, stack)
            outcome = trainer.fit()
        except Exception as error:
            if watch.cause_of(error) is None:
                aborts.of_error(error)
            raise
    verdict = Verdict(
        status=outcome.status,
        detail=outcome.detail,
        gates=tuple(session.results + outcome.gates),
        facts={
            **start.provenance,
            "config_digest": config.digest(),
            **outcome.facts,
            "checkpoint": str(config.run_dir / CHECKPOINT_NAME),
        },
        synthetic=config.synthetic,
    )
    runtime.on_main(lambda: write_atomically(config.run_dir / VERDICT_NAME, json_bytes(verdict.to_json())))
    return verdict


def _trainer(session: _Session, stack: contextlib.ExitStack) -> Trainer:
    config, runtime, resumed = session.config, session.runtime, session.resumed
    train_data, eval_data = open_data(config, session.start.model_config, runtime, stack, session.display)
    trackers = Trackers(
        config.trackers if runtime.is_main else (),
        run_dir=config.run_dir,
        values=flat(config.model_dump(mode="json")),
        warn=session.display.warn,
        resumed_step=resumed.step if resumed else None,
    )
    stack.enter_context(trackers)
    metrics = MetricsFile(
        config.run_dir / METRICS_NAME if runtime.is_main else None,
        common={"synthetic": True} if config.synthetic else {},
        told=[session.display.measured, trackers.measured],
        after_step=resumed.step if resumed else None,
    )
    stack.enter_context(metrics)
    exchange = Exchange(runtime)
    metrics.event("load", {"step": resumed.step if resumed else 0, "wall_ms": session.load_s * 1e3})
    trainer = Trainer(
        config=config,
        runtime=runtime,
        model=session.model,
        start=session.start,
        train_data=train_data,
        eval_data=eval_data,
        metrics=metrics,
        saver=Saver(config, runtime, session.start, config.run_dir, exchange, session.display),
        display=session.display,
        resumed=resumed,
    )
    if resumed is not None and session.step_folder is not None:
        restore(session.model, trainer.engine.optimizer, session.step_folder, runtime, exchange)
        session.display(f"going on after step {resumed.step}, with the optimizer state of that step")
    return trainer
