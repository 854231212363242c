"""One run from proven inputs to a verdict: processes, weights, data, the loop, what it leaves behind."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from apr_dist import __version__
from apr_dist.config import TrainConfig
from apr_dist.data.loader import EvaluationLoader, TokenLoader
from apr_dist.data.manifest import Manifest
from apr_dist.data.storage import write_atomically
from apr_dist.data.synthetic import SyntheticEvaluation, SyntheticTokens
from apr_dist.errors import AprDistError, OutputError
from apr_dist.gates.output import create_run_dir
from apr_dist.gates.preflight import Preflight
from apr_dist.gates.result import GateResult
from apr_dist.model.config import Family, TransformerConfig
from apr_dist.model.transformer import Decoder, init_weights
from apr_dist.parallel import runtime as processes
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.weights import load_weights, prove_weights, weight_digests
from apr_dist.training.checkpoint import CHECKPOINT_NAME, json_bytes
from apr_dist.training.metrics import MetricsFile
from apr_dist.training.trainer import Start, Trainer, TrainingData
from apr_dist.training.verdict import Status, Verdict

CONFIG_NAME = "config.yaml"
METRICS_NAME = "metrics.jsonl"
VERDICT_NAME = "verdict.json"

Say = Callable[[str], None]


def execute(
    config: TrainConfig, preflight: Preflight | None, refusal: AprDistError | None, say: Say
) -> Verdict:
    """Start the processes, let all of them know what rank 0 found, train, and judge.

    Args:
        config: the resolved configuration.
        preflight: rank 0's proven inputs; None on other ranks, and where it was refused.
        refusal: rank 0's refusal, raised on every rank.
        say: prints one line on rank 0.

    Raises:
        AprDistError: on every rank alike, for whatever rank 0 refused.
    """
    options = config.parallel
    runtime = processes.start(
        device=config.device,
        strategy=options.strategy,
        precision=options.precision,
        cpu_threads=options.cpu_threads,
        timeout_s=options.timeout_s,
    )
    runtime.agree(refusal)
    facts = runtime.broadcast_json(None if preflight is None else _shared(preflight))
    model_config = TransformerConfig.from_metadata(
        facts["architecture"],
        family=Family(facts["family"]),
        where="rank 0",
        tie_word_embeddings=facts["tied"],
    )
    say(
        f"running on {runtime.device} as {runtime.strategy} over {runtime.world_size} process(es),"
        f" {config.parallel.precision}, {runtime.cpu_threads} CPU thread(s) each"
    )
    runtime.on_main(lambda: _open_run_dir(config))
    model, arrived = _build_model(model_config, preflight, config, runtime, say)
    results = [GateResult(**gate) for gate in facts["gates"]] + [arrived]
    start = Start(
        model_config=model_config,
        from_init=config.init is not None,
        metadata=preflight.reader.metadata if preflight and preflight.reader else None,
        provenance={**facts["provenance"], "tool_version": __version__, "seed": config.seed},
        recorded_val_loss=facts["recorded_val_loss"],
    )
    return _train(config, runtime, model, start, results, say)


def _shared(preflight: Preflight) -> dict[str, Any]:
    config = preflight.model_config
    return {
        "architecture": config.to_metadata(),
        "family": config.family.value,
        "tied": config.tie_word_embeddings,
        "gates": [result.to_json() for result in preflight.results],
        "provenance": preflight.provenance,
        "recorded_val_loss": preflight.recorded_val_loss,
    }


def _open_run_dir(config: TrainConfig) -> None:
    create_run_dir(config.run_dir)
    for name in (VERDICT_NAME, METRICS_NAME):
        try:
            (config.run_dir / name).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot be replaced ({error.strerror})", where=config.run_dir / name
            ) from error
    write_atomically(config.run_dir / CONFIG_NAME, config.to_yaml().encode())


def _build_model(
    model_config: TransformerConfig,
    preflight: Preflight | None,
    config: TrainConfig,
    runtime: Runtime,
    say: Say,
) -> tuple[Decoder, GateResult]:
    began = time.perf_counter()
    with torch.device("meta"):
        model = Decoder(model_config)
    model.to_empty(device=runtime.device)
    model.reset_buffers()
    if config.init is not None:
        digests = load_weights(model, preflight.reader if preflight else None, runtime)
        source = f"from {config.init}"
    else:
        init_weights(model, seed=config.seed)
        digests = runtime.broadcast_json(weight_digests(model) if runtime.is_main else None)
        prove_weights(model, digests, runtime)
        source = f"from seed {config.seed}"
    arrived = GateResult(
        id="FALSIFY-APR-DIST-TRAINER-001",
        gate="weights arrived in the network",
        measured=f"{len(digests)} tensors {source}, digests equal on {runtime.world_size} rank(s)",
        required="every digest equal to its source's, on every rank",
    )
    took = time.perf_counter() - began
    say(f"gate passed: {arrived.gate}: {arrived.measured} ({took:.1f} s)  [{arrived.id}]")
    return model, arrived


def _train(
    config: TrainConfig, runtime: Runtime, model: Decoder, start: Start, results: list[GateResult], say: Say
) -> Verdict:
    metrics_path = config.run_dir / METRICS_NAME if runtime.is_main else None
    common = {"synthetic": True} if config.synthetic else {}
    with contextlib.ExitStack() as stack:
        train_data, eval_data = _open_data(config, start.model_config, runtime, stack, say)
        metrics = stack.enter_context(MetricsFile(metrics_path, common=common))
        try:
            trainer = Trainer(
                config=config,
                runtime=runtime,
                model=model,
                start=start,
                train_data=train_data,
                eval_data=eval_data,
                metrics=metrics,
                say=say,
            )
            outcome = trainer.fit(config.run_dir)
        except AprDistError as error:
            _record_abort(config, runtime, results, start, error)
            raise
    verdict = Verdict(
        status=outcome.status,
        detail=outcome.detail,
        gates=tuple(results + outcome.gates),
        facts={**start.provenance, **outcome.facts, "checkpoint": str(config.run_dir / CHECKPOINT_NAME)},
        synthetic=config.synthetic,
    )
    runtime.on_main(lambda: write_atomically(config.run_dir / VERDICT_NAME, json_bytes(verdict.to_json())))
    return verdict


def _record_abort(
    config: TrainConfig, runtime: Runtime, results: list[GateResult], start: Start, error: AprDistError
) -> None:
    """Leave a verdict of what stopped the run; the error itself matters more than failing to."""
    if not runtime.is_main:
        return
    verdict = Verdict(
        status=Status.ABORTED,
        detail=str(error),
        gates=tuple(results),
        facts={**start.provenance, "exit_code": int(error.exit_code), "falsifier": error.falsifier},
        synthetic=config.synthetic,
    )
    with contextlib.suppress(OutputError):
        write_atomically(config.run_dir / VERDICT_NAME, json_bytes(verdict.to_json()))


def _open_data(
    config: TrainConfig,
    model_config: TransformerConfig,
    runtime: Runtime,
    stack: contextlib.ExitStack,
    say: Say,
) -> tuple[TrainingData, Iterable[torch.Tensor]]:
    micro = config.micro_batch_size or max(1, config.batch_size // runtime.world_size)
    if config.synthetic:
        made_up = SyntheticTokens(
            vocab_size=model_config.vocab_size,
            seq_length=config.seq_length,
            batch_size=config.batch_size,
            micro_batch=micro,
            rank=runtime.rank,
            world_size=runtime.world_size,
            seed=config.seed,
        )
        return made_up, SyntheticEvaluation(made_up)
    training, held_out = _manifest(config.dataset), _manifest(config.val_dataset)
    loader = TokenLoader(
        training,
        seq_length=config.seq_length,
        global_batch=config.batch_size,
        micro_batch=micro,
        rank=runtime.rank,
        world_size=runtime.world_size,
        seed=config.seed,
        shuffle=config.loader.shuffle.value,
        block_sequences=config.loader.block_sequences,
        max_epochs=config.loader.max_epochs,
        verify=config.loader.verify.value,
    )
    stack.callback(loader.close)
    evaluation = EvaluationLoader(
        held_out,
        seq_length=config.seq_length,
        micro_batch=config.evaluation.micro_batch_size or micro,
        rank=runtime.rank,
        world_size=runtime.world_size,
        max_sequences=config.evaluation.max_sequences,
    )
    stack.callback(evaluation.close)
    say(f"training on {loader.sequences_per_epoch:,} sequences; held out: {evaluation.describe()}")
    return loader, evaluation


def _manifest(folder: Path | None) -> Manifest:
    assert folder is not None
    return Manifest.load(folder)
