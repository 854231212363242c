"""One step of a run once more, looked at closely: which sequence made its loss or gradient what it was.

The run folder says everything: configuration, step folders, what the step was refused for. The run is taken
up before the step, in one process, driven to it with the batches it had, and the step's global batch is then
computed as a whole and sequence by sequence. Nothing is updated by it and nothing written.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apr_dist.config import TrainConfig
from apr_dist.config_sections import Documents, StrategyChoice
from apr_dist.data.tokenizer import LoadedTokenizer, load_tokenizer
from apr_dist.errors import AprDistError, UsageError
from apr_dist.gates.preflight import run_preflight
from apr_dist.model.kernels.loss import IGNORE_INDEX
from apr_dist.parallel import runtime as processes
from apr_dist.parallel.exchange import Exchange
from apr_dist.parallel.sharding import build_decoder
from apr_dist.parallel.state import restore
from apr_dist.parallel.weights import draw_weights, load_weights
from apr_dist.parsing import parse_json
from apr_dist.training.config_text import load_config
from apr_dist.training.display import Display
from apr_dist.training.evaluation import Batch
from apr_dist.training.metrics import MetricsFile
from apr_dist.training.progress import Start
from apr_dist.training.run import METRICS_NAME, VERDICT_NAME
from apr_dist.training.run_data import open_data
from apr_dist.training.saving import Saver
from apr_dist.training.step_folders import (
    CHECKPOINT_NAME,
    SavedState,
    read_state,
    whole_folders,
)
from apr_dist.training.stepping import BatchFeed
from apr_dist.training.trainer import Trainer

TEXT_CHARACTERS = 400


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """One sequence of the batch.

    Attributes:
        number: its place in the stream of the run.
        loss: mean loss of its targets, in nats.
        grad_norm: norm of the gradient of its share of the batch's loss.
        text: its beginning, where a tokenizer is known.
    """

    number: int
    loss: float
    grad_norm: float
    text: str | None

    @property
    def is_finite(self) -> bool:
        """Whether both figures are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What a step was made of.

    Attributes:
        step: counted from 1.
        begun_from: the step folder or model file its weights came from.
        redone: steps that were taken between that and this one.
        loss: of the global batch, in nats per token.
        grad_norm: of the global batch, before clipping.
        recorded: what metrics.jsonl says of that step.
        sequences: every sequence of the batch.
    """

    step: int
    begun_from: str
    redone: int
    loss: float
    grad_norm: float
    recorded: dict[str, Any] | None
    sequences: list[Sequence]

    @property
    def culprits(self) -> list[Sequence]:
        """The sequences that are not finite; where all are, the one with the largest gradient."""
        wrong = [one for one in self.sequences if not one.is_finite]
        return wrong or [max(self.sequences, key=lambda one: one.grad_norm)]


def replay(run_dir: Path, *, step: int | None, device: str | None, say: Callable[[str], None]) -> Replayed:
    """Compute step ``step`` of the run in ``run_dir`` once more.

    Args:
        run_dir: a run folder; its data and, without a step folder before the step, its init must be there.
        step: counted from 1; None: the one the run was refused for.
        device: where to compute; None: as the run did.
        say: told what is being done.

    Raises:
        UsageError: no run folder, or no such step.
        AprDistError: as the run's own gates and loaders.
    """
    config = load_config(run_dir)
    wanted = _step(run_dir, step, config)
    alone = {"strategy": StrategyChoice.SINGLE, "shard_size": None}
    config = config.model_copy(
        update={
            "run_dir": run_dir,
            "overwrite": True,
            "device": device or config.device,
            "parallel": config.parallel.model_copy(update=alone),
        }
    )
    folder = next((one for one in reversed(whole_folders(run_dir)) if int(one.name) < wanted), None)
    state = read_state(folder) if folder else None
    with contextlib.ExitStack() as stack:
        trainer, begun_from = _trainer(config, folder, state, stack, say)
        begun_at = trainer.progress.step
        if wanted - 1 > begun_at:
            say(f"taking steps {begun_at + 1} to {wanted - 1} again")
        trainer.advance_to(wanted - 1)
        taken = trainer.stepper.measure(wanted - 1)
        text = _reader_of_text(config)
        return Replayed(
            step=wanted,
            begun_from=begun_from,
            redone=wanted - 1 - begun_at,
            loss=taken.train_loss,
            grad_norm=taken.grad_norm,
            recorded=_recorded(run_dir, wanted),
            sequences=list(_each_sequence(trainer, text)),
        )


def _step(run_dir: Path, step: int | None, config: TrainConfig) -> int:
    if step is None:
        with contextlib.suppress(OSError, ValueError):
            step = parse_json((run_dir / VERDICT_NAME).read_text())["facts"].get("step")
    if step is None or not 1 <= step <= config.num_steps:
        raise UsageError(
            "no step was named, and the run was not refused for one" if step is None else f"step is {step}",
            where=run_dir,
            expected=f"a step from 1 to {config.num_steps}",
            remedy="name it with --step",
        )
    return step


def _trainer(
    config: TrainConfig,
    folder: Path | None,
    state: SavedState | None,
    stack: contextlib.ExitStack,
    say: Callable[[str], None],
) -> tuple[Trainer, str]:
    checkpoint = folder / CHECKPOINT_NAME if folder else None
    found = run_preflight(config, world_size=1, say=lambda _: None, resume_from=checkpoint)
    stack.callback(found.close)
    options = config.parallel
    runtime = processes.start(
        device=config.device,
        strategy="single",
        precision=options.precision,
        cpu_threads=options.cpu_threads,
        timeout_s=options.timeout_s,
    )
    begun_from = str(found.reader.path) if found.reader else f"seed {config.seed}"
    say(f"from {begun_from}, on {runtime.device}")
    model = build_decoder(found.model_config, runtime)
    if found.reader is not None:
        load_weights(model, found.reader, runtime)
    else:
        draw_weights(model, found.model_config, runtime, seed=config.seed)
    start = Start(
        model_config=found.model_config, from_init=config.init is not None, metadata=None, provenance={}
    )
    quiet, exchange = Display(), Exchange(runtime)
    train_data, eval_data = open_data(config, found.model_config, runtime, stack, quiet)
    trainer = Trainer(
        config=config,
        runtime=runtime,
        model=model,
        start=start,
        train_data=train_data,
        eval_data=eval_data,
        metrics=MetricsFile(None, common={}),
        saver=Saver(config, runtime, start, config.run_dir, exchange, quiet),
        display=quiet,
        resumed=state,
    )
    if folder is not None:
        restore(model, trainer.engine.optimizer, folder, runtime, exchange)
    return trainer, begun_from


def _each_sequence(trainer: Trainer, text: Callable[[torch.Tensor], str | None]) -> Iterator[Sequence]:
    config, runtime, model = trainer.config, trainer.runtime, trainer.model
    number = trainer.progress.step
    feed = BatchFeed(
        trainer.train_data,
        runtime.device,
        ignored_ids=config.loader.ignored_ids,
        isolate=config.loader.documents is Documents.ISOLATE,
    )
    batches = feed.take(number)
    singles = [_row(batch, index) for batch in batches for index in range(len(batch.inputs))]
    counted = sum(int((one.targets != IGNORE_INDEX).sum()) for one in singles)
    model.train()
    for index, one in enumerate(singles):
        model.zero_grad(set_to_none=True)
        with runtime.accelerator.autocast():
            total, count = model(one.inputs, one.targets, document_ids=one.document_ids)
        (total / counted).backward()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        squares = torch.stack([gradient.double().square().sum() for gradient in gradients])
        yield Sequence(
            number=number * config.batch_size + index,
            loss=float(total.detach()) / max(1, int(count)),
            grad_norm=math.sqrt(float(squares.sum())),
            text=text(one.inputs[0]),
        )
    model.zero_grad(set_to_none=True)


def _row(batch: Batch, index: int) -> Batch:
    """One sequence of a micro-batch, as a micro-batch."""
    one, ids = slice(index, index + 1), batch.document_ids
    return Batch(batch.inputs[one], batch.targets[one], None if ids is None else ids.row(index))


def _reader_of_text(config: TrainConfig) -> Callable[[torch.Tensor], str | None]:
    loaded: LoadedTokenizer | None = None
    candidates = [config.tokenizer, config.init.with_suffix(".tokenizer") if config.init else None]
    for folder in filter(None, candidates):
        with contextlib.suppress(AprDistError, OSError):
            loaded = load_tokenizer(folder)
            break

    def read(row: torch.Tensor) -> str | None:
        return None if loaded is None else loaded.decode(row.tolist())[:TEXT_CHARACTERS]

    return read


def _recorded(run_dir: Path, step: int) -> dict[str, Any] | None:
    path = run_dir / METRICS_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [one for one in map(parse_json, lines) if one.get("step") == step]
    return next((one for one in found if one["kind"] in {"step", "refused", "skipped"}), None)
