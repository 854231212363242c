"""The data of a run as its configuration names it: training batches, and held-out sequences.

How batches are made is in ``data``; whether the shards are good was asked before, by the gates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apr_dist.config import TrainConfig
from apr_dist.data.loader import EvaluationLoader, TokenLoader
from apr_dist.data.manifest import Manifest
from apr_dist.data.own_batches import OwnBatches, OwnHeldOut
from apr_dist.data.synthetic import SyntheticEvaluation, SyntheticTokens
from apr_dist.data.training_set import open_training_set
from apr_dist.model.config import TransformerConfig
from apr_dist.parallel.runtime import Runtime
from apr_dist.runs.display import Display
from apr_dist.runs.progress import Progress
from apr_dist.training.evaluation import HeldOut
from apr_dist.training.stepping import TrainingData


@dataclass(frozen=True, kw_only=True)
class OwnData:
    """Batches that a program hands in.

    Attributes:
        train: global batches in order, each integers [batch_size, seq_length + 1].
        held_out: the same for evaluation, iterable more than once; None: ``val_dataset``, if any.
    """

    train: Iterable[Any]
    held_out: Iterable[Any] | None = None


@dataclass(frozen=True, kw_only=True)
class RunData:
    """This rank's share of the data.

    Attributes:
        train: global batches by number.
        held_out: held-out sequences, iterated once per evaluation; None without any.
        further: held-out sequences of the named sets that do not count.
    """

    train: TrainingData
    held_out: HeldOut | None
    further: Mapping[str, HeldOut] = field(default_factory=dict)

    @property
    def has_conversations(self) -> bool:
        """Whether any of it is conversations, which are kept apart whatever ``loader.documents`` is."""
        measured = (self.held_out, *self.further.values())
        return self.train.flagged or any(one is not None and one.flagged for one in measured)

    def facts(self) -> dict[str, str]:
        """The identities of both, which must be the same on every rank."""
        held_out = "none" if self.held_out is None else self.held_out.fingerprint
        further = {f"held-out data {name}": one.fingerprint for name, one in self.further.items()}
        return {"training data": self.train.fingerprint, "held-out data": held_out, **further}


def open_data(
    config: TrainConfig,
    model_config: TransformerConfig,
    runtime: Runtime,
    stack: contextlib.ExitStack,
    say: Display,
    progress: Progress,
    own: OwnData | None = None,
) -> RunData:
    """This rank's training batches and held-out sequences, closed with the stack."""
    sizes: dict[str, Any] = {
        "seq_length": config.seq_length,
        "micro_batch": config.micro_batch(runtime.world_size),
        "rank": runtime.rank,
        "world_size": runtime.world_size,
    }
    rows, batch_size = model_config.vocab_size, config.batch_size
    if config.synthetic:
        drawn = SyntheticTokens(vocab_size=rows, batch_size=batch_size, seed=config.seed, **sizes)
        return RunData(train=drawn, held_out=SyntheticEvaluation(drawn))
    evaluation: HeldOut | None = None
    further: dict[str, HeldOut] = {}
    replaced = own is not None and own.held_out is not None
    named = config.evaluation.sets if replaced else config.held_out
    for number, (name, folder) in enumerate(named.items()):
        one = held_out(config, runtime, config.evaluation.max_sequences, folder)
        stack.callback(one.close)
        if number or replaced:
            further[name] = one
            say(f"held out and measured as well: {name}, {one.describe()}")
        else:
            evaluation = one
    if own is not None:
        if own.held_out is not None:
            evaluation = OwnHeldOut(own.held_out, vocab_size=rows, batch_size=batch_size, **sizes)
        train = OwnBatches(own.train, vocab_size=rows, batch_size=batch_size, **sizes)
        return RunData(train=train, held_out=evaluation, further=further)
    loader = TokenLoader(
        open_training_set(config.dataset, config.loader.mixture),
        global_batch=batch_size,
        seed=config.seed,
        shuffle=config.loader.shuffle.value,
        block_sequences=config.loader.block_sequences,
        max_epochs=config.loader.max_epochs,
        verify=config.loader.verify.value,
        access=config.loader.access.value,
        max_open_shards=config.loader.max_open_shards,
        prefetch_batches=config.loader.prefetch_batches,
        pin_memory=config.loader.pin_memory,
        origin=progress.data_origin,
        **sizes,
    )
    stack.callback(loader.close)
    described = evaluation.describe() if isinstance(evaluation, EvaluationLoader) else "none"
    say(f"training on {loader.sequences_per_epoch:,} sequences; held out: {described}")
    return RunData(train=loader, held_out=evaluation, further=further)


def held_out(
    config: TrainConfig, runtime: Runtime, max_sequences: int | None, folder: Path | None = None
) -> EvaluationLoader:
    """This rank's share of a fixed sample of held-out sequences; None takes all, of the set that counts."""
    return EvaluationLoader(
        Manifest.load(folder or next(iter(config.held_out.values()))),
        seq_length=config.seq_length,
        micro_batch=config.evaluation.micro_batch_size or config.micro_batch(runtime.world_size),
        rank=runtime.rank,
        world_size=runtime.world_size,
        max_sequences=max_sequences,
        verify=config.loader.verify.value,
        access=config.loader.access.value,
    )
