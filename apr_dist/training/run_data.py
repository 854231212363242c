"""The data of a run as its configuration names it: training batches, and held-out sequences.

How batches are made is in ``data``; whether the shards are good was asked before, by the gates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch

from apr_dist.config import TrainConfig
from apr_dist.data.loader import EvaluationLoader, TokenLoader
from apr_dist.data.manifest import Manifest
from apr_dist.data.synthetic import SyntheticEvaluation, SyntheticTokens
from apr_dist.data.training_set import open_training_set
from apr_dist.model.config import TransformerConfig
from apr_dist.parallel.runtime import Runtime
from apr_dist.training.display import Display
from apr_dist.training.stepping import TrainingData


def open_data(
    config: TrainConfig,
    model_config: TransformerConfig,
    runtime: Runtime,
    stack: contextlib.ExitStack,
    say: Display,
) -> tuple[TrainingData, Iterable[torch.Tensor]]:
    """This rank's training batches and held-out sequences, closed with the stack."""
    micro = config.micro_batch(runtime.world_size)
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
    loader = TokenLoader(
        open_training_set(config.dataset, config.loader.mixture),
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
        access=config.loader.access.value,
        max_open_shards=config.loader.max_open_shards,
        prefetch_batches=config.loader.prefetch_batches,
        pin_memory=config.loader.pin_memory,
    )
    stack.callback(loader.close)
    evaluation = held_out(config, runtime, config.evaluation.max_sequences)
    stack.callback(evaluation.close)
    say(f"training on {loader.sequences_per_epoch:,} sequences; held out: {evaluation.describe()}")
    return loader, evaluation


def held_out(config: TrainConfig, runtime: Runtime, max_sequences: int | None) -> EvaluationLoader:
    """This rank's share of a fixed sample of the held-out sequences; None takes all of them."""
    assert config.val_dataset is not None
    return EvaluationLoader(
        Manifest.load(config.val_dataset),
        seq_length=config.seq_length,
        micro_batch=config.evaluation.micro_batch_size or config.micro_batch(runtime.world_size),
        rank=runtime.rank,
        world_size=runtime.world_size,
        max_sequences=max_sequences,
        verify=config.loader.verify.value,
        access=config.loader.access.value,
    )
