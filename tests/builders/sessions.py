"""Sessions of a model alone, for tests of what is below the trainer's loop: no gate, no run folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from apr_dist.apr.reader import AprReader
from apr_dist.choices import Strategy
from apr_dist.model.config import TransformerConfig
from apr_dist.model.families import Family
from apr_dist.parallel.runtime import reset_state
from apr_dist.training.library import without_gates
from apr_dist.training.session import Session


def architecture_of(path: Path, family: Family = Family.QWEN2) -> TransformerConfig:
    """The architecture that a file states, tied."""
    with AprReader(path) as reader:
        keys = reader.metadata.to_mapping()
    return TransformerConfig.from_metadata(keys, family=family, where=path, tie_word_embeddings=True)


def open_alone(
    model: TransformerConfig | Path,
    strategy: Strategy,
    *,
    shard_size: int | None = None,
    parallel: dict[str, Any] | None = None,
    batches: Iterable[Any] = (),
    **settings: Any,
) -> Session:
    """A session of a decoder on these processes' CPUs, its weights drawn, or those of a file of Qwen2.

    Args:
        model: an architecture, or a file.
        strategy: what runs.
        shard_size: ranks that share a copy, which only HSDP is told.
        parallel: more of that section of the configuration.
        batches: global batches, for its stepper.
        settings: other keys of the configuration.
    """
    reset_state()  # of the session before, whose process group stays
    main = os.environ.get("RANK", "0") == "0"
    section = {"strategy": strategy.value, "cpu_threads": 1, "timeout_s": 120, **(parallel or {})}
    if strategy is Strategy.HSDP:
        section["shard_size"] = shard_size
    reader = None
    if isinstance(model, Path):
        settings["init"] = str(model)
        reader, model = AprReader(model) if main else None, architecture_of(model)
    opened = without_gates(
        model,
        reader=reader,
        batches=batches,
        device="cpu",
        parallel=section,
        warmup_steps=0,
        **settings,
    )
    return Session(*opened)
