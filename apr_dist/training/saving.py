"""Saving: one whole step folder at a time, on rank 0, read back before the one before it may go."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from apr_dist.atomic_files import write_atomically, writing_to
from apr_dist.config import TrainConfig
from apr_dist.parallel.moments import whole_moments
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.state import file_digest, save_optimizer
from apr_dist.parallel.weights import save_weights
from apr_dist.training.checkpoint import (
    FACTS_NAME,
    CheckpointFacts,
    checkpoint_metadata,
    json_bytes,
    perplexity,
)
from apr_dist.training.progress import Progress, Start
from apr_dist.training.step_folders import (
    CHECKPOINT_NAME,
    OPTIMIZER_NAME,
    SavedState,
    finish,
    retire,
    step_folder,
)


class Saver:
    """Writes where a run is; what it wrote last is always whole.

    Args:
        config: the resolved configuration.
        runtime: this rank's view of the processes.
        start: what the run starts from.
        run_dir: the run folder.
        say: prints one line on rank 0.
    """

    def __init__(
        self, config: TrainConfig, runtime: Runtime, start: Start, run_dir: Path, say: Callable[[str], None]
    ) -> None:
        self._config, self._runtime, self._start = config, runtime, start
        self._run_dir, self._say = run_dir, say
        self._began = time.perf_counter()

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Save model, optimizer and progress as one step folder; every rank calls this.

        Raises:
            OutputError: on every rank; the folder before it is untouched.
            WeightsRefused: the file on disk does not hold what the model holds.
        """
        began = time.perf_counter()
        runtime, folder = self._runtime, step_folder(self._run_dir, progress.step)
        runtime.on_main(lambda: _make(folder))
        metadata = None
        if runtime.is_main:
            metadata = checkpoint_metadata(
                self._start.model_config, self._start.metadata, self._provenance(progress)
            )
        save_weights(model, folder / CHECKPOINT_NAME, metadata, overwrite=True, runtime=runtime)
        moments = {}
        for name, value in whole_moments(model, optimizer, runtime):
            if runtime.is_main:
                moments[name] = value.cpu().contiguous()
        runtime.on_main(lambda: self._finish(folder, moments, progress, began))

    def _finish(
        self, folder: Path, moments: Mapping[str, torch.Tensor], progress: Progress, began: float
    ) -> None:
        target = folder / CHECKPOINT_NAME
        optimizer_digest = save_optimizer(moments, folder / OPTIMIZER_NAME)
        finish(folder, self._run_dir, self._state(progress, file_digest(target), optimizer_digest))
        facts = self._facts(progress, optimizer_digest)
        write_atomically(self._run_dir / FACTS_NAME, json_bytes(asdict(facts)))
        keep = self._config.checkpoint
        retire(self._run_dir, keep_last=keep.keep_last, keep_every=keep.keep_every)
        took = time.perf_counter() - began
        self._say(f"step {progress.step:>6}  saved {target} ({took:.1f} s, read back)")

    def _provenance(self, progress: Progress) -> dict[str, object]:
        return {
            **self._start.provenance,
            "step": progress.step,
            "tokens_seen": progress.tokens_seen,
            "train_loss": progress.train_loss,
            "val_loss": progress.val_loss_now,
            "config_digest": self._config.digest(),
            "synthetic": True if self._config.synthetic else None,
        }

    def _state(self, progress: Progress, checkpoint_digest: str, optimizer_digest: str) -> SavedState:
        return SavedState(
            step=progress.step,
            epoch=progress.epoch,
            tokens_seen=progress.tokens_seen,
            train_loss=progress.train_loss,
            grad_norm_max=progress.grad_norm_max,
            evaluations=[[one.loss, one.tokens, one.wall_s] for one in progress.evaluations],
            agreements=[[one.step, one.train_loss, one.eval_loss] for one in progress.agreements],
            config=self._config.model_dump(mode="json"),
            config_digest=self._config.digest(),
            data_fingerprint=self._start.provenance.get("data_fingerprint"),
            init_digest=self._start.provenance.get("init_digest"),
            checkpoint_digest=checkpoint_digest,
            optimizer_digest=optimizer_digest,
            first_gates=[gate.to_json() for gate in progress.first_gates],
            evaluated_at=progress.evaluated_at,
        )

    def _facts(self, progress: Progress, optimizer_digest: str) -> CheckpointFacts:
        return CheckpointFacts(
            epoch=progress.epoch,
            step=progress.step,
            train_loss=progress.train_loss,
            val_loss=progress.val_loss,
            train_ppl=perplexity(progress.train_loss),
            val_ppl=perplexity(progress.val_loss),
            optimizer_state_sha=optimizer_digest,
            wall_seconds=time.perf_counter() - self._began,
            tokens_seen=progress.tokens_seen,
            grad_norm_max=progress.grad_norm_max,
        )


def _make(folder: Path) -> None:
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
