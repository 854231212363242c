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

from apr_dist.choices import Offload, StrategyChoice
from apr_dist.config import TrainConfig
from apr_dist.config.text import load_config
from apr_dist.corpus.tokenizer import LoadedTokenizer, load_tokenizer
from apr_dist.errors import AprDistError, UsageError
from apr_dist.gates.preflight import run_preflight
from apr_dist.model.kernels.loss import IGNORE_INDEX
from apr_dist.parsing import parse_json
from apr_dist.runs.display import Display
from apr_dist.runs.folder import RunFolder, StepFolder
from apr_dist.runs.resume import NEVER, ResumePoint
from apr_dist.runs.saved_state import read_state
from apr_dist.training.evaluation import Batch
from apr_dist.training.proving import Around, Proven
from apr_dist.training.session import Session

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
    run, config = RunFolder(run_dir), load_config(run_dir)
    wanted = _step(run, step, config)
    one_process = {"strategy": StrategyChoice.SINGLE, "shard_size": None, "offload": Offload.NONE}
    config = config.model_copy(
        update={
            "run_dir": run_dir,
            "resume": NEVER,
            "device": device or config.device,
            "parallel": config.parallel.model_copy(update=one_process),
        }
    )
    folder = next((one for one in reversed(run.whole()) if one.step < wanted), None)
    with _open(config, folder, say) as session:
        begun_at = session.progress.step
        if wanted - 1 > begun_at:
            say(f"taking steps {begun_at + 1} to {wanted - 1} again")
        for _ in session.steps(until=wanted - 1):
            pass
        taken = session.stepper.measure(wanted - 1)
        text = _reader_of_text(config.tokenizer, config.init)
        return Replayed(
            step=wanted,
            begun_from=str(folder.checkpoint if folder else config.init or f"seed {config.seed}"),
            redone=wanted - 1 - begun_at,
            loss=taken.train_loss,
            grad_norm=taken.grad_norm,
            recorded=_recorded(run, wanted),
            sequences=list(_each_sequence(session, text)),
        )


def _step(run: RunFolder, step: int | None, config: TrainConfig) -> int:
    if step is None:
        with contextlib.suppress(OSError, ValueError):
            step = parse_json(run.verdict.read_text())["facts"].get("step")
    if step is None or not 1 <= step <= config.num_steps:
        raise UsageError(
            "no step was named, and the run was not refused for one" if step is None else f"step is {step}",
            where=run.path,
            expected=f"a step from 1 to {config.num_steps}",
            remedy="name it with --step",
        )
    return step


@contextlib.contextmanager
def _open(config: TrainConfig, folder: StepFolder | None, say: Callable[[str], None]) -> Iterator[Session]:
    """A session of the run as it stood when ``folder`` was saved, in one process, that writes nothing."""
    around = Around(display=Display())
    found = run_preflight(
        config, world_size=1, say=around.display, resume_from=folder.checkpoint if folder else None
    )
    try:
        point = ResumePoint(folder, read_state(folder), changed=False) if folder else None
        with Session(config, Proven(preflight=found, point=point), around) as session:
            say(f"from {found.reader.path if found.reader else f'seed {config.seed}'}, on {session.about}")
            yield session
    finally:
        found.close()


def _each_sequence(session: Session, text: Callable[[torch.Tensor], str | None]) -> Iterator[Sequence]:
    config, runtime, model = session.config, session.runtime, session.model
    number = session.progress.step
    batches = session.make_feed().take(number)
    origin, first = session.progress.data_origin
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
            number=first + (number - origin) * config.batch_size + index,
            loss=float(total.detach()) / max(1, int(count)),
            grad_norm=math.sqrt(float(squares.sum())),
            text=text(one.inputs[0]),
        )
    model.zero_grad(set_to_none=True)


def _row(batch: Batch, index: int) -> Batch:
    """One sequence of a micro-batch, as a micro-batch."""
    one, ids = slice(index, index + 1), batch.document_ids
    return Batch(batch.inputs[one], batch.targets[one], None if ids is None else ids.row(index))


def _reader_of_text(tokenizer: Path | None, init: Path | None) -> Callable[[torch.Tensor], str | None]:
    loaded: LoadedTokenizer | None = None
    candidates = [tokenizer, init.with_suffix(".tokenizer") if init else None]
    for folder in filter(None, candidates):
        with contextlib.suppress(AprDistError, OSError):
            loaded = load_tokenizer(folder)
            break

    def read(row: torch.Tensor) -> str | None:
        return None if loaded is None else loaded.decode(row.tolist())[:TEXT_CHARACTERS]

    return read


def _recorded(run: RunFolder, step: int) -> dict[str, Any] | None:
    lines = run.metrics.read_text(encoding="utf-8").splitlines() if run.metrics.exists() else []
    found = [one for one in map(parse_json, lines) if one.get("step") == step]
    return next((one for one in found if one["kind"] in {"step", "refused", "skipped"}), None)
