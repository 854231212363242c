"""What a run will be, before it runs: sizes, memory, time, gates, and what will hurt. No PyTorch here.

The gates are the run's own (``gates.preflight``); memory is in ``memory``; how a plan is printed is in
``plan_text``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from apr_dist.choices import Device, Mode, StrategyChoice
from apr_dist.config import TrainConfig
from apr_dist.data.manifest import Manifest
from apr_dist.data.training_set import open_training_set, parts_of
from apr_dist.errors import AprDistError
from apr_dist.gates.data import check_sequences
from apr_dist.gates.preflight import model_from_name, run_preflight
from apr_dist.gates.result import GateResult
from apr_dist.model.config import TransformerConfig
from apr_dist.model.flops import flops_per_token
from apr_dist.planning.memory import Load, Memory, estimate
from apr_dist.training.schedule import Schedule, schedule_of

FEW_TOKENS_PER_PARAMETER: Final = 10
"""Below this a model trained from scratch is far from what its size could learn."""

HIGH_FINETUNE_LR: Final = 2e-4
"""Above this, full fine-tuning tends to undo what the weights hold."""

FEW_HELD_OUT_TOKENS: Final = 50_000
"""Below this a validation loss is too noisy to compare."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What the shards hold: tokens, and whole sequences of the run's length."""

    tokens: int
    sequences: int
    held_out_sequences: int


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A speed someone gives: tokens a second over all processes, or MFU of a peak per device."""

    tokens_per_s: float | None = None
    mfu: float | None = None
    peak_flops: float | None = None

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
        world_size: processes.
        flops_per_token: of forward and backward.
        data: what the shards hold; None for made-up tokens and where it could not be read.
        memory: of one process, by strategy, the configured one first.
        schedule: the learning rate by step.
        gates: those that passed, in order.
        refusal: the gate that said no, if one did.
        warnings: what will hurt, one sentence each.
        wall_s: seconds of training steps at the given speed.
    """

    config: TrainConfig
    model: TransformerConfig
    world_size: int
    flops_per_token: int
    data: Data | None
    memory: dict[StrategyChoice, Memory]
    schedule: Schedule
    gates: list[GateResult]
    refusal: AprDistError | None
    warnings: list[str]
    wall_s: float | None

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
        return self.config.num_steps * self.config.batch_size / self.data.sequences

    @property
    def tokens_per_parameter(self) -> float:
        """Training tokens over trainable values."""
        return self.tokens / self.model.parameter_count()


def make_plan(config: TrainConfig, *, world_size: int, rate: Rate) -> Plan:
    """Ask every gate that can be asked now, and work out the rest from dimensions.

    Raises:
        AprDistError: the model itself cannot be known, so there is nothing to plan.
    """
    config = config.resolved()
    model, gates, refusal, unchecked = _ask_gates(config, world_size)
    flops = flops_per_token(model, config.seq_length)
    speed = rate.tokens_per_second(flops, world_size)
    tokens = config.num_steps * config.batch_size * config.seq_length
    data = _data(config)
    plan = Plan(
        config=config,
        model=model,
        world_size=world_size,
        flops_per_token=flops,
        data=data,
        memory=_memory(model, config, world_size),
        schedule=schedule_of(config),
        gates=gates,
        refusal=refusal,
        warnings=unchecked,
        wall_s=tokens / speed if speed else None,
    )
    plan.warnings.extend(_warnings(plan))
    return plan


def under_trained(config: TrainConfig, parameters: int) -> str | None:
    """The warning that a model from scratch gets too few tokens for its size; None where it gets enough.

    Args:
        config: the resolved configuration.
        parameters: trainable values of the model.
    """
    tokens = config.num_steps * config.batch_size * config.seq_length
    if config.init is not None or not tokens or tokens >= FEW_TOKENS_PER_PARAMETER * parameters:
        return None
    return (
        f"UNDER-TRAINED: {config.num_steps:,} steps x {config.batch_size} x {config.seq_length:,} ="
        f" {tokens:,} tokens over {parameters:,} parameters = {tokens / parameters:.2f} a parameter, below"
        f" {FEW_TOKENS_PER_PARAMETER}; train on more tokens or choose a smaller model"
    )


def _ask_gates(
    config: TrainConfig, world_size: int
) -> tuple[TransformerConfig, list[GateResult], AprDistError | None, list[str]]:
    try:
        found = run_preflight(config, world_size=world_size, say=lambda _: None, read_weights=False)
    except AprDistError as refusal:
        return _model_despite(config, refusal), [], refusal, []
    found.close()
    return found.model_config, found.results, None, list(found.warnings)


def _model_despite(config: TrainConfig, refusal: AprDistError) -> TransformerConfig:
    """The model of a run that a gate refused, where the refusal was about something else."""
    if config.init is None:
        return model_from_name(config.model)
    # Without data, and with a batch and a folder nobody can object to, only the model is asked about.
    harmless = {"synthetic": True, "batch_size": 1, "micro_batch_size": 1, "overwrite": True}
    try:
        asked = config.model_copy(update=harmless)
        found = run_preflight(asked, world_size=1, say=lambda _: None, read_weights=False)
    except AprDistError:
        raise refusal from None
    found.close()
    return found.model_config


def _data(config: TrainConfig) -> Data | None:
    if config.synthetic or config.val_dataset is None:
        return None
    try:
        parts = parts_of(open_training_set(config.dataset, config.loader.mixture))
        held_out = Manifest.load(config.val_dataset)
        return Data(
            tokens=sum(part.total_tokens for part in parts),
            sequences=sum(check_sequences(part, seq_length=config.seq_length) for part in parts),
            held_out_sequences=check_sequences(held_out, seq_length=config.seq_length),
        )
    except AprDistError:
        return None  # the gates have said so already


def _memory(model: TransformerConfig, config: TrainConfig, world: int) -> dict[StrategyChoice, Memory]:
    chosen = config.parallel.strategy
    if chosen is StrategyChoice.AUTO:
        chosen = StrategyChoice.SINGLE if world == 1 else StrategyChoice.DDP
    several = [one for one in StrategyChoice if one not in {StrategyChoice.AUTO, StrategyChoice.SINGLE}]
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
    )
    # Without a given size, hsdp shards over one machine; 8 GPUs are what one has.
    shard = config.parallel.shard_size or min(world, 8)
    return {
        one: estimate(
            model,
            load,
            strategy=one,
            world_size=world,
            shard_size=shard,
            offload=config.parallel.offload,
            state_bits=config.optimizer.state_bits,
        )
        for one in dict.fromkeys([chosen, *(several if world > 1 else [])])
    }


def _warnings(plan: Plan) -> list[str]:
    config, found = plan.config, []
    if (too_few := under_trained(config, plan.model.parameter_count())) is not None:
        found.append(too_few)
    if config.init is not None and config.peak_lr > HIGH_FINETUNE_LR:
        found.append(
            f"lr {config.peak_lr:g} is high for pretrained weights (above {HIGH_FINETUNE_LR:g}):"
            " the first steps may undo what they hold"
        )
    if config.init is not None and config.mode is Mode.FROM_SCRATCH:
        found.append("mode is from-scratch and there is an init: its weights, the from-scratch defaults")
    if 0 < config.num_steps <= config.warmup:
        found.append(
            f"warm-up of {config.warmup:,} steps does not end within {config.num_steps:,}:"
            f" lr reaches {plan.schedule.lr_at(config.num_steps - 1):.1e}, never {config.peak_lr:g}"
        )
    if 0 < config.num_steps < config.eval_every:
        found.append(f"eval_every {config.eval_every:,} is above num_steps: one evaluation, at the end")
    limit = plan.model.rope_scaling.original_max_position_embeddings if plan.model.rope_scaling else None
    if limit and config.seq_length > limit:
        found.append(f"sequences of {config.seq_length:,} are longer than the {limit:,} the model began with")
    return found + _data_warnings(plan)


def _data_warnings(plan: Plan) -> list[str]:
    data, config = plan.data, plan.config
    if data is None or plan.passes is None:
        return []
    found = []
    held = min(data.held_out_sequences, config.evaluation.max_sequences or data.held_out_sequences)
    if held * config.seq_length < FEW_HELD_OUT_TOKENS:
        found.append(
            f"validation is over {held:,} sequences, {held * config.seq_length:,} tokens: too few to"
            f" tell small gains from noise (fewer than {FEW_HELD_OUT_TOKENS:,})"
        )
    if plan.passes > (config.loader.max_epochs or float("inf")):
        found.append(
            f"{plan.passes:.1f} passes over the data and loader.max_epochs {config.loader.max_epochs}:"
            " the run will stop with StreamExhausted"
        )
    elif plan.passes > 4:
        found.append(f"{plan.passes:.1f} passes over the data: beyond about 4, repeated tokens teach little")
    return found
