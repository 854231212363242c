"""What will hurt and is allowed: one sentence each, for a run and for its plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from apr_dist.apr.layout import HF_CONFIG
from apr_dist.choices import Mode
from apr_dist.config import TrainConfig
from apr_dist.data.manifest import Manifest
from apr_dist.gates.data import check_sequences
from apr_dist.model.config import TransformerConfig
from apr_dist.model.families import HF_KEYS, Effect, Family

FEW_TOKENS_PER_PARAMETER: Final = 10
"""Below this a model trained from scratch is far from what its size could learn."""

HIGH_FINETUNE_LR: Final = 2e-4
"""Above this, full fine-tuning tends to undo what the weights hold."""

FEW_HELD_OUT_TOKENS: Final = 50_000
"""Below this a validation loss is too noisy to compare."""

MANY_PASSES: Final = 4
"""Beyond about this many passes, repeated tokens teach little (Muennighoff et al. 2023, arXiv:2305.16264)."""


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What the shards hold: tokens, and whole sequences of the run's length."""

    tokens: int
    sequences: int
    held_out_sequences: int

    @classmethod
    def of(cls, parts: Sequence[Manifest], held_out: Manifest, *, seq_length: int) -> DataFacts:
        """Facts of training sets and a held-out one.

        Raises:
            DataError: one of them has no shard that is longer than a sequence.
        """
        return cls(
            tokens=sum(part.total_tokens for part in parts),
            sequences=sum(check_sequences(part, seq_length=seq_length) for part in parts),
            held_out_sequences=check_sequences(held_out, seq_length=seq_length),
        )

    def passes(self, *, num_steps: int, batch_size: int) -> float:
        """How often a run sees every training sequence."""
        return num_steps * batch_size / self.sequences


def warnings_of(config: TrainConfig, model: TransformerConfig, data: DataFacts | None) -> list[str]:
    """Everything to be warned of before the first step.

    Args:
        config: the resolved configuration.
        model: the decoder that will be trained.
        data: what the shards hold; None for made-up tokens and where it could not be read.
    """
    found = [*_about_steps(config, model)]
    return found if data is None else [*found, *_about_data(config, data)]


def left_out_of(metadata: Mapping[str, Any], family: Family) -> list[str]:
    """What the configuration of the model's source asks for and training does not do, one sentence each.

    Args:
        metadata: the custom metadata of the model file.
        family: of the model.
    """
    config = metadata.get(HF_CONFIG)
    found = []
    for key, value in config.items() if isinstance(config, Mapping) else ():
        rule = {**HF_KEYS, **family.definition.hf_keys}.get(key)
        if (
            rule is not None
            and rule.effect is Effect.LEFT_OUT
            and value is not None
            and not rule.accepts(value)
        ):
            found.append(f"the model's configuration states {key} {value}, which is left out: {rule.why}")
    return found


def _about_steps(config: TrainConfig, model: TransformerConfig) -> Iterator[str]:
    if config.init is None:
        tokens = (config.num_steps, config.batch_size, config.seq_length)
        if (too_few := under_trained(*tokens, parameters=model.parameter_count())) is not None:
            yield too_few
    elif config.peak_lr > HIGH_FINETUNE_LR:
        yield (
            f"lr {config.peak_lr:g} is high for pretrained weights (above {HIGH_FINETUNE_LR:g}):"
            " the first steps may undo what they hold"
        )
    if config.init is not None and config.mode is Mode.FROM_SCRATCH:
        yield "--mode from-scratch with --init: the file's weights, the from-scratch defaults"
    if 0 < config.num_steps <= config.warmup:
        reached = config.peak_lr * config.num_steps / config.warmup
        yield (
            f"warm-up of {config.warmup:,} steps does not end within {config.num_steps:,}:"
            f" lr reaches {reached:.1e}, never {config.peak_lr:g}"
        )
    if 0 < config.num_steps < config.eval_every:
        yield f"eval_every {config.eval_every:,} is above num_steps: one evaluation, at the end"
    limit = model.rope_scaling.original_max_position_embeddings if model.rope_scaling else None
    if limit and config.seq_length > limit:
        yield f"sequences of {config.seq_length:,} are longer than the {limit:,} the model began with"


def _about_data(config: TrainConfig, data: DataFacts) -> Iterator[str]:
    held = min(data.held_out_sequences, config.evaluation.max_sequences or data.held_out_sequences)
    if held * config.seq_length < FEW_HELD_OUT_TOKENS:
        yield (
            f"validation is over {held:,} sequences, {held * config.seq_length:,} tokens: too few to"
            f" tell small gains from noise (fewer than {FEW_HELD_OUT_TOKENS:,})"
        )
    passes = data.passes(num_steps=config.num_steps, batch_size=config.batch_size)
    if passes > (config.loader.max_epochs or float("inf")):
        yield (
            f"{passes:.1f} passes over the data and loader.max_epochs {config.loader.max_epochs}:"
            " the run will stop with StreamExhausted"
        )
    elif passes > MANY_PASSES:
        yield f"{passes:.1f} passes over the data: beyond about {MANY_PASSES}, repeated tokens teach little"


def under_trained(num_steps: int, batch_size: int, seq_length: int, *, parameters: int) -> str | None:
    """The warning that a model from scratch gets too few tokens for its size; None where it gets enough."""
    tokens = num_steps * batch_size * seq_length
    if not tokens or tokens >= FEW_TOKENS_PER_PARAMETER * parameters:
        return None
    return (
        f"UNDER-TRAINED: {num_steps:,} steps x {batch_size} x {seq_length:,} ="
        f" {tokens:,} tokens over {parameters:,} parameters = {tokens / parameters:.2f} a parameter, below"
        f" {FEW_TOKENS_PER_PARAMETER}; train on more tokens or choose a smaller model"
    )
