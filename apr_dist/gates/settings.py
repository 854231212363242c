"""Gate: the settings of a run go together. Asked before any file is opened, by a run and by its plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from apr_dist.choices import (
    TRACKER_OPTIONS,
    TRACKERS,
    ActivationCheckpointing,
    Compile,
    Device,
    KernelChoice,
    ScheduleKind,
)
from apr_dist.config import TrainConfig, nearest
from apr_dist.config.sections import ComputeSection, OptimizerSection, TrackingSection
from apr_dist.errors import UsageError
from apr_dist.gates.adapters import check_adapter_settings
from apr_dist.gates.data import check_batch
from apr_dist.parallel.launch import read_launch
from apr_dist.parallel.state_bits import check_installed
from apr_dist.parallel.storage import Storage
from apr_dist.parallel.strategy import check_strategy

_MODULES: Mapping[str, tuple[str, ...]] = {"tensorboard": ("tensorboard", "tensorboardX")}
"""Where a tracker can be had from several modules, or from one of another name."""

_EXTRA = {"tensorboard": "'apr-dist[track]'"}


def check_settings(config: TrainConfig, *, world_size: int) -> None:
    """Every rule on settings alone, in order.

    Args:
        config: the resolved configuration.
        world_size: processes that will run.

    Raises:
        UsageError, DistributedError: the first rule that is broken.
    """
    check_trackers(config.trackers)
    check_tracking(config.tracking, config.trackers)
    check_held_out(config)
    check_installed(config.optimizer.state_bits)
    check_decay(config.optimizer, num_steps=config.num_steps, warmup=config.warmup)
    check_kernels(config)
    options, launch = config.parallel, read_launch()
    strategy = check_strategy(
        options.strategy,
        world=world_size,
        per_machine=launch.local_world_size if launch.world_size == world_size else None,
        shard_size=options.shard_size,
        storage=Storage(
            weights=config.memory.weights, gradients=config.memory.gradients, offload=options.offload
        ),
        precision=options.precision,
        state_bits=config.optimizer.state_bits,
    )
    check_adapter_settings(config, strategy)
    check_compute(config.compute)
    check_batch(batch_size=config.batch_size, micro_batch=config.micro_batch_size, world_size=world_size)
    if config.init is not None and config.model != TrainConfig.model_fields["model"].default:
        raise UsageError(
            f"--model {config.model} and --init {config.init} both name an architecture",
            where="command line",
            expected="the file's own architecture with --init, or --model without it",
            remedy="leave one of them out",
        )


def check_kernels(config: TrainConfig) -> None:
    """A set of kernels that is asked for can compute on the run's device, or on the one found here.

    Raises:
        UsageError: it cannot.
    """
    asked, device = config.compute.kernels, config.device.value
    if asked is KernelChoice.AUTO:
        return
    import torch  # noqa: PLC0415  (only this key needs it before the gates)

    from apr_dist.model.kernels.choice import choose_kernels  # noqa: PLC0415

    if config.device is Device.AUTO:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    compiled = config.compute.compile is Compile.BLOCK
    choose_kernels(asked, torch.device(device), compiled=compiled)


def check_trackers(names: Sequence[str]) -> None:
    """Every tracker's package is installed.

    Raises:
        UsageError: naming the command that installs it.
    """
    for name in names:
        if not any(find_spec(module) for module in _MODULES.get(name, (name,))):
            raise UsageError(
                f"the tracker {name} is not installed",
                where="--track",
                expected="its package in this environment",
                remedy=f"pip install {_EXTRA.get(name, name)}",
            )


def check_held_out(config: TrainConfig) -> None:
    """Named validation sets stand alone, differ, and one of them counts; prompts can be answered.

    Raises:
        UsageError: naming the set or the key.
    """
    options, sets = config.evaluation, config.evaluation.sets
    if sets and config.val_dataset is not None:
        raise UsageError(
            "evaluation.sets and val_dataset both name held-out shards",
            where="--val-dataset",
            expected="one of them",
            remedy=f"give it a name among the sets: --evaluation.sets validation={config.val_dataset},...",
        )
    if options.counts is not None and options.counts not in sets:
        close = nearest(options.counts, list(sets))
        raise UsageError(
            f"evaluation.counts is {options.counts} and no set has that name",
            where="--evaluation.counts",
            expected=f"one of {', '.join(sets)}" if sets else "names in evaluation.sets",
            remedy=f"use {close}" if close else "name a set, or leave it out",
        )
    seen: dict[Path, str] = {}
    for name, path in sets.items():
        if (other := seen.setdefault(path.resolve(), name)) != name:
            raise UsageError(
                f"the validation sets {other} and {name} are the same folder, {path}",
                where="--evaluation.sets",
                expected="a folder for each name",
                remedy="leave one of them out",
            )
    if options.prompts is not None and config.synthetic:
        raise UsageError(
            "evaluation.prompts is set in a run on made-up tokens",
            where="--evaluation.prompts",
            expected="a run on text",
            remedy="leave the prompts out, or --synthetic",
        )
    if options.prompts is not None and config.compute.compile is not Compile.OFF:
        raise UsageError(
            f"evaluation.prompts is set with compute.compile {config.compute.compile}",
            where="--evaluation.prompts",
            expected="blocks that are not compiled, which take a text of any length",
            remedy="use --compute.compile off, or leave the prompts out",
        )


def check_tracking(options: TrackingSection, names: Sequence[str]) -> None:
    """Every key of ``tracking`` that is set means something to a tracker of the run.

    Raises:
        UsageError: naming the trackers that have such a thing.
    """
    for key, default in TrackingSection().model_dump().items():
        able = [name for name in TRACKERS if key == "project" or key in TRACKER_OPTIONS.get(name, {})]
        if getattr(options, key) != default and not set(able) & set(names):
            raise UsageError(
                f"tracking.{key} is set, and of the trackers ({', '.join(names) or 'none'}) none has it",
                where=f"--tracking.{key}",
                expected=f"one of {', '.join(able)} in --track",
                remedy=f"leave --tracking.{key} out, or add --track {able[-1]}",
            )


def check_compute(options: ComputeSection) -> None:
    """Block inputs are moved to host memory between compiled calls, which see no hook inside.

    Raises:
        UsageError: both were asked for.
    """
    offloads = options.activation_checkpointing is ActivationCheckpointing.FULL_OFFLOAD
    if offloads and options.compile is Compile.BLOCK:
        raise UsageError(
            "--compute.activation-checkpointing full-offload and --compute.compile block do not go together",
            where="--compute.activation-checkpointing",
            expected="blocks that are not compiled, or inputs that stay on the device",
            remedy="use --compute.activation-checkpointing full, or --compute.compile off",
        )


def check_decay(options: OptimizerSection, *, num_steps: int, warmup: int) -> None:
    """``decay_steps`` belongs to wsd and fits between warm-up and the end.

    Raises:
        UsageError: it does not.
    """
    if options.decay_steps is None:
        return
    left = max(0, num_steps - warmup)
    if options.schedule is not ScheduleKind.WSD or (num_steps and options.decay_steps > left):
        raise UsageError(
            f"optimizer.decay_steps is {options.decay_steps} with schedule {options.schedule},"
            f" {num_steps} steps and {warmup} of warm-up",
            where="--optimizer.decay-steps",
            expected="schedule wsd, and at most the steps that follow warm-up",
            remedy="lower it, leave it out, or use --optimizer.schedule wsd",
        )
