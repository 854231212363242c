"""What a run will be, before it runs: sizes, memory, time, gates, and what will hurt. No PyTorch here.

The gates are the run's own (``gates.preflight``); memory is in ``memory``; how a plan is printed is in
``plan_text``.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from importlib.util import find_spec

from apr_dist.choices import Device, Strategy
from apr_dist.config import TrainConfig
from apr_dist.data.manifest import Manifest
from apr_dist.data.training_set import open_training_set, parts_of
from apr_dist.errors import AprDistError, UsageError
from apr_dist.gates.adapters import adapter_of, with_base_bits
from apr_dist.gates.preflight import Preflight, model_from_name, prove_model_file, run_preflight
from apr_dist.gates.result import GateResult
from apr_dist.gates.warnings import DataFacts, warnings_of
from apr_dist.model.config import TransformerConfig
from apr_dist.model.flops import flops_per_token
from apr_dist.parallel.storage import Storage
from apr_dist.parallel.strategy import GPUS_PER_MACHINE, named
from apr_dist.planning.activations import Load
from apr_dist.planning.fitting import Rungs, fit
from apr_dist.planning.memory import Memory, estimate
from apr_dist.planning.stopping import StopTime, stop_time
from apr_dist.runs.folder import RunFolder
from apr_dist.runs.opening import check_folder
from apr_dist.runs.resume import find_resume_point
from apr_dist.training.schedule import Schedule, schedule_of


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Speeds someone gives: tokens a second over all processes, or MFU of a peak per device; of the disk."""

    tokens_per_s: float | None = None
    mfu: float | None = None
    peak_flops: float | None = None
    disk_bytes_per_s: float | None = None

    def tokens_per_second(self, flops_per_token: int, world_size: int) -> float | None:
        """Tokens a second of the whole run, or None when nothing was given."""
        if self.tokens_per_s is not None:
            return self.tokens_per_s
        if self.mfu is None or self.peak_flops is None:
            return None
        return self.mfu * self.peak_flops * world_size / flops_per_token


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is known before a run.

    Attributes:
        config: the resolved configuration.
        model: the decoder that will be trained.
        trained_parameters: its parameters, or those of the adapter that is trained beside them.
        world_size: processes.
        flops_per_token: of forward and backward.
        data: what the shards hold; None for made-up tokens and where it could not be read.
        memory: of one process, by strategy, the configured one first.
        schedule: the learning rate by step.
        gates: those that passed, in order.
        refusal: the gate that said no, if one did.
        warnings: what will hurt, one sentence each.
        wall_s: seconds of training steps at the given speed.
        stop: what finishing a step and saving take when the run is told to stop.
        memory_bytes: memory of one device, where it was given.
    """

    config: TrainConfig
    model: TransformerConfig
    trained_parameters: int
    world_size: int
    flops_per_token: int
    data: DataFacts | None
    memory: dict[Strategy, Memory]
    schedule: Schedule
    gates: list[GateResult]
    refusal: AprDistError | None
    warnings: list[str]
    wall_s: float | None
    stop: StopTime
    memory_bytes: int | None = None

    @property
    def tokens_per_step(self) -> int:
        """Target tokens of one global batch."""
        return self.config.batch_size * self.config.seq_length

    @property
    def tokens(self) -> int:
        """Target tokens of all steps."""
        return self.tokens_per_step * self.config.num_steps

    @property
    def passes(self) -> float | None:
        """How often the run sees every training sequence."""
        if self.data is None:
            return None
        return self.data.passes(num_steps=self.config.num_steps, batch_size=self.config.batch_size)

    @property
    def tokens_per_parameter(self) -> float:
        """Training tokens over trainable values."""
        return self.tokens / self.model.parameter_count()


def make_plan(
    config: TrainConfig,
    *,
    world_size: int,
    rate: Rate,
    memory_bytes: int | None = None,
    grace_s: float | None = None,
) -> Plan:
    """Ask every gate that can be asked now, and work out the rest from dimensions.

    Args:
        config: the configuration of the run.
        world_size: processes that will run.
        rate: the speed that is expected.
        memory_bytes: memory of one device, to tell what fits.
        grace_s: seconds between SIGTERM and SIGKILL, to tell whether they suffice.

    Raises:
        AprDistError: the model itself cannot be known, so there is nothing to plan.
    """
    config = config.resolved()
    found, refusal = _ask_gates(config, world_size)
    model = found.model_config
    if found.adapter is not None:  # what the file decides where nobody asked
        config = with_base_bits(config, found.adapter.base_bits)
    flops = flops_per_token(model, config.seq_length, adapter=found.adapter)
    speed = rate.tokens_per_second(flops, world_size)
    tokens = config.num_steps * config.batch_size * config.seq_length
    stop = stop_time(
        config,
        parameters=found.trained_parameters,
        tokens_per_s=speed,
        grace_s=grace_s,
        disk_bytes_per_s=rate.disk_bytes_per_s,
    )
    return Plan(
        config=config,
        model=model,
        trained_parameters=found.trained_parameters,
        world_size=world_size,
        flops_per_token=flops,
        data=found.data,
        memory=_memory(model, config, world_size),
        schedule=schedule_of(config),
        gates=found.results,
        refusal=refusal,
        warnings=[*found.warnings, *([stop.warning] if stop.warning else [])],
        stop=stop,
        wall_s=tokens / speed if speed else None,
        memory_bytes=memory_bytes,
    )


def _ask_gates(config: TrainConfig, world_size: int) -> tuple[Preflight, AprDistError | None]:
    """What the run's own gates found, and the refusal of the one that said no."""
    run = RunFolder(config.run_dir)
    try:
        point = find_resume_point(config, run, lambda _: None)
        checkpoint = point.folder.checkpoint if point else None
        found = run_preflight(
            config, world_size=world_size, say=lambda _: None, resume_from=checkpoint, read_weights=False
        )
        found.close()
        check_folder(config, run, point, parameters=found.trained_parameters)
    except AprDistError as refusal:
        return _despite(config, refusal), refusal
    return found, None


def _despite(config: TrainConfig, refusal: AprDistError) -> Preflight:
    """The model and the data of a run that a gate refused, where the refusal was about something else."""
    with contextlib.ExitStack() as stack:
        try:
            if config.init is None:
                found = Preflight(model_config=model_from_name(config.model), reader=None)
            else:
                found = prove_model_file(config.init, stack, lambda _: None, read_weights=False)
        except AprDistError:
            raise refusal from None
    with contextlib.suppress(AprDistError):
        found.adapter = adapter_of(config.adapter, found.model_config, found.reader)
    found.data = _data(config)
    found.results = []
    found.warnings += warnings_of(config, found.model_config, found.data)
    return found


def _data(config: TrainConfig) -> DataFacts | None:
    if config.synthetic or not config.held_out:
        return None
    try:
        parts = parts_of(open_training_set(config.dataset, config.loader.mixture))
        held_out = Manifest.load(next(iter(config.held_out.values())))
        return DataFacts.of(parts, held_out, seq_length=config.seq_length)
    except AprDistError:
        return None  # the gates have said so already


def _has_liger() -> bool:
    return find_spec("liger_kernel") is not None


def fitting(made: Plan, *, card: int, host: int | None, step_s: float) -> Rungs:
    """The rungs of the memory ladder that fit one card with the least slowdown; see ``fitting``.

    Raises:
        UsageError: nothing fits, or the run has several processes.
    """
    if made.world_size != 1:
        raise UsageError(
            f"--fit and {made.world_size} processes",
            where="command line",
            expected="one process on one card",
            remedy="leave --processes out, or use --simulate for several cards",
        )
    model = made.model
    return fit(
        lambda config: next(iter(_memory(model, config, 1).values())),
        made.config,
        card=card,
        host=host,
        step_s=step_s,
    )


def _memory(model: TransformerConfig, config: TrainConfig, world: int) -> dict[Strategy, Memory]:
    chosen, adapter = named(config.parallel.strategy, world), None
    with contextlib.suppress(AprDistError):  # a refusal says so
        adapter = adapter_of(config.adapter, model)
    several = [one for one in Strategy if one is not Strategy.SINGLE]
    micro = config.micro_batch(world)
    load = Load(
        micro_batch=micro,
        seq_length=config.seq_length,
        accumulates=config.batch_size > micro * world,
        precision=config.parallel.precision,
        cuda=config.device is Device.CUDA,
        checkpointing=config.compute.activation_checkpointing,
        copies=config.checkpoint.background,
        trains_meanwhile=config.save_period < config.num_steps,
        liger=config.device is Device.CUDA and not config.compute.z_loss and _has_liger(),
    )
    shard = config.parallel.shard_size or min(world, GPUS_PER_MACHINE)
    return {
        one: estimate(
            model,
            load,
            strategy=one,
            world_size=world,
            shard_size=shard,
            offload=config.parallel.offload,
            state_bits=config.optimizer.state_bits,
            storage=Storage(weights=config.memory.weights, gradients=config.memory.gradients),
            adapter=adapter,
        )
        for one in dict.fromkeys([chosen, *(several if world > 1 else [])])
    }
