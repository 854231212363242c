"""What rank 0 proves before any rank loads anything: the gates, where to resume, whether the folder is free.

Imports no PyTorch by itself, so that a refusal takes a second.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from apr_dist.config import TrainConfig
from apr_dist.errors import AprDistError, as_known
from apr_dist.gates.preflight import Preflight, run_preflight
from apr_dist.parallel.heartbeat import HERE, Phase
from apr_dist.parallel.launch import Launch
from apr_dist.parallel.strategy import refuse_launched_precision
from apr_dist.parallel.watchdog import Watch
from apr_dist.runs.display import Display
from apr_dist.runs.folder import RunFolder
from apr_dist.runs.lock import RunLock
from apr_dist.runs.opening import check_folder
from apr_dist.runs.resume import ResumePoint, find_resume_point, refuse_other_inputs

if TYPE_CHECKING:
    from apr_dist.training.run_data import OwnData


@dataclass(frozen=True, kw_only=True)
class Around:
    """What a session is opened within.

    Attributes:
        display: what a user sees on rank 0.
        watch: ends every rank when one fails or all stand still; None without one.
        lock: on the run folder; None writes nothing: no folder, no metrics, no saves.
        own: batches of the program in place of shards.
    """

    display: Display
    watch: Watch | None = None
    lock: RunLock | None = None
    own: OwnData | None = None


@dataclass(frozen=True, kw_only=True)
class Proven:
    """The inputs of a run as rank 0 proved them; empty on other ranks.

    Attributes:
        preflight: the gates that passed, and the open init file.
        point: the step folder to resume; None begins at step 0.
        refusal: what rank 0 refused, to be raised on every rank.
    """

    preflight: Preflight | None = None
    point: ResumePoint | None = None
    refusal: AprDistError | None = None

    def close(self) -> None:
        """Close the init file."""
        if self.preflight is not None:
            self.preflight.close()

    def facts(self, config: TrainConfig) -> dict[str, Any] | None:
        """What the other ranks need to know, as JSON values; None if there is nothing."""
        if self.preflight is None:
            return None
        found, point, model = self.preflight, self.point, self.preflight.model_config
        return {
            "architecture": model.to_metadata(),
            "family": model.family.value,
            "tied": model.tie_word_embeddings,
            "gates": [result.to_json() for result in found.results],
            "provenance": found.provenance,
            "base_bits": None if found.adapter is None else found.adapter.base_bits,
            "recorded_val_loss": found.recorded_val_loss,
            "resumed": asdict(point.state) if point else None,
            "step_folder": str(point.folder.path.absolute()) if point else None,
            "changed": bool(point and point.changed),
            "weights_from": str(found.reader.path) if found.reader else None,
            "init": None if config.init is None else str(config.init),
            "init_digest": found.given_init_digest or found.provenance.get("init_digest"),
        }


def prove(config: TrainConfig, launch: Launch, around: Around) -> Proven:
    """Ask every gate on rank 0; other ranks get an empty result and wait for rank 0's.

    Args:
        config: the resolved configuration.
        launch: this process among the others.
        around: its display prints each gate's line; its lock is taken if the run folder exists.
    """
    if launch.rank != 0:
        return Proven()
    HERE.enter(Phase.GATES)
    try:
        return _prove(config, launch.world_size, around)
    except AprDistError as refusal:
        return Proven(refusal=refusal)
    except Exception as error:  # the other ranks are on their way to a group that must hear of it
        internal = as_known(error)
        internal.__cause__ = error
        return Proven(refusal=internal)


def _prove(config: TrainConfig, world_size: int, around: Around) -> Proven:
    display, lock, run = around.display, around.lock, RunFolder(config.run_dir)
    refuse_launched_precision(config.parallel.precision)
    if lock is not None:
        lock.take()
    point = find_resume_point(config, run, display.warn, display.working)
    found = run_preflight(
        config,
        world_size=world_size,
        say=display,
        resume_from=point.folder.checkpoint if point else None,
        own_data=around.own is not None,
        own_held_out=around.own is not None and around.own.held_out is not None,
        progress=display.working,
    )
    parameters = found.trained_parameters
    try:
        if point is not None:
            refuse_other_inputs(config, point, found.provenance, init_digest=found.given_init_digest)
        if lock is not None:
            check_folder(config, run, point, parameters=parameters)
    except AprDistError:
        found.close()
        raise
    for warning in found.warnings:
        display.warn(warning)
    return Proven(preflight=found, point=point)
