"""What a program calls: open a session, take its steps, or train it to its end.

The command line is ``apr_dist.train``; both open the same `Session`. Nothing here is computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from apr_dist.apr.reader import AprReader
from apr_dist.atomic_files import write_atomically
from apr_dist.choices import ProgressStyle
from apr_dist.config import TrainConfig
from apr_dist.config.reading import read_yaml, validate
from apr_dist.gates.preflight import Preflight
from apr_dist.model.config import TransformerConfig
from apr_dist.parallel.launch import read_launch
from apr_dist.parallel.runtime import reset_state
from apr_dist.parallel.watchdog import Watch
from apr_dist.runs.checkpoint import json_bytes
from apr_dist.runs.display import Display
from apr_dist.runs.display_choice import open_display
from apr_dist.runs.folder import RunFolder
from apr_dist.runs.lock import RunLock
from apr_dist.runs.verdict import Status, Verdict
from apr_dist.training.proving import Around, Proven, prove
from apr_dist.training.run_data import OwnData
from apr_dist.training.session import Session
from apr_dist.training.trainer import train


def open_session(
    config: str | Path | TrainConfig | None = None,
    *,
    batches: Iterable[Any] | None = None,
    val_batches: Iterable[Any] | None = None,
    **overrides: Any,
) -> Session:
    """Prove a run's inputs and open everything it trains with; use the result in a ``with`` statement.

    Works in a plain process, in a notebook, and on every rank of ``accelerate launch`` or ``torchrun``.
    Nothing is printed unless ``progress`` is given.

    Args:
        config: a YAML file, a configuration, or None for the defaults.
        batches: own training batches in place of ``dataset``: an iterable of integers
            [batch_size, seq_length + 1], the same on every rank.
        val_batches: own held-out batches of that shape, iterable more than once, in place of
            ``val_dataset``.
        overrides: keys of the configuration, such as ``lr=1e-4``; the keys of a section as a mapping,
            such as ``optimizer={"weight_decay": 0.0}``.

    Raises:
        AprDistError: what a run of these settings would refuse, on every rank alike.
    """
    settings = _settings(config, overrides).resolved()
    launch, own = read_launch(), None
    if batches is not None:
        own = OwnData(train=batches, held_out=val_batches)
    with contextlib.ExitStack() as stack:
        display = open_display(settings.progress, rank=launch.rank, synthetic=settings.synthetic)
        stack.callback(display.close)
        watch = None
        if launch.world_size > 1:
            watch = Watch(rank=launch.rank).start()
            stack.callback(watch.leave)
        else:
            stack.callback(reset_state)  # so that the process can open another session
        lock = stack.enter_context(RunLock(RunFolder(settings.run_dir), display.warn))
        around = Around(display=display, watch=watch, lock=lock, own=own)
        proven = prove(settings, launch, around)
        stack.callback(proven.close)
        if proven.refusal is not None and launch.world_size == 1:
            raise proven.refusal
        session = Session(settings, proven, around)
        stack.push(_leave_verdict(session))
        session.closes_with(stack.pop_all())
    return session


def without_gates(
    architecture: TransformerConfig,
    *,
    reader: AprReader | None = None,
    batches: Iterable[Any] = (),
    **overrides: Any,
) -> tuple[TrainConfig, Proven, Around]:
    """What a `Session` opens with when no gate is asked and nothing is written, as a measurement needs it.

    Args:
        architecture: of the decoder, which need not be a preset.
        reader: the open file its weights come from, on rank 0; without one they are drawn.
        batches: as for `open_session`.
        overrides: as for `open_session`.
    """
    proven = Proven(preflight=Preflight(model_config=architecture, reader=reader))
    around = Around(display=Display(), own=OwnData(train=batches))
    return _settings(None, overrides).resolved(), proven, around


def fit(session: Session) -> Verdict:
    """Train a session to its end as the command line does: evaluate, step, save, judge.

    Returns:
        the verdict, which is also in ``verdict.json``.
    """
    return train(session)


def _settings(config: str | Path | TrainConfig | None, overrides: Mapping[str, Any]) -> TrainConfig:
    tree: dict[str, Any] = {"progress": ProgressStyle.QUIET.value}
    if isinstance(config, TrainConfig):
        tree |= config.model_dump(mode="json")
    elif config is not None:
        tree |= read_yaml(Path(config))
    for key, value in overrides.items():
        section = tree.get(key)
        tree[key] = {**section, **value} if isinstance(section, dict) and isinstance(value, dict) else value
    return validate(tree, where="open_session")


def _leave_verdict(session: Session) -> Any:
    """Called at the end of a ``with`` block: leave a verdict if neither ``fit`` nor an error did."""

    def leave(kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None or not session.runtime.is_main or session.run.verdict.exists():
            return
        state = session.progress
        verdict = Verdict(
            status=Status.COMPLETED,
            detail=f"the program closed its session after step {state.step}",
            gates=(*session.gates, *state.first_gates),
            facts={
                **session.start.provenance,
                "config_digest": session.config.digest(),
                "run": session.start.run,
                "steps": state.step,
                "tokens_seen": state.tokens_seen,
                "train_loss": state.train_loss,
                "val_losses": [one.loss for one in state.evaluations],
                "strategy": session.runtime.strategy.value,
                "world_size": session.runtime.world_size,
            },
            synthetic=session.config.synthetic,
        )
        write_atomically(session.run.verdict, json_bytes(verdict.to_json()))

    return leave
