"""Saving: one whole step folder at a time, read back before the one before it may go.

Each rank copies what it gives into host memory, and training goes on while a thread writes the copies;
where the copies do not fit, or on request, training waits for the write instead. One save is under way at
a time, and what fails in one is raised on all ranks at a step's end, never lost.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import psutil
import torch
from torch import nn

from apr_dist.apr.metadata import AprMetadata
from apr_dist.atomic_files import file_digest, write_atomically, writing_to
from apr_dist.config import TrainConfig
from apr_dist.errors import AprDistError, DistributedError
from apr_dist.interop.adapter_files import write_peft_folder
from apr_dist.parallel.gather import WeightParts, save_weights, weight_parts
from apr_dist.parallel.heartbeat import HERE, Phase
from apr_dist.parallel.launch import read_launch
from apr_dist.parallel.optimizer_files import part_name, random_pieces, write_part
from apr_dist.parallel.optimizer_index import index_text
from apr_dist.parallel.optimizer_shards import moment_pieces, updates_done
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.save_group import Exchange
from apr_dist.parallel.shard_layout import Piece
from apr_dist.runs.checkpoint import (
    CheckpointFacts,
    adapter_metadata,
    checkpoint_metadata,
    json_bytes,
    perplexity,
)
from apr_dist.runs.folder import RunFolder, StepFolder
from apr_dist.runs.progress import Progress, Start
from apr_dist.runs.resume import binding
from apr_dist.runs.saved_state import SavedState, best, read_state, retire, write_state

LEAVING_S = 8.0
"""How long a run that ends with an error still waits for the save under way."""

ROOM = 1.25
"""Host memory that must be free before copies are made, as a multiple of the copies of this machine."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What one save writes; ``metadata``, ``state`` and ``facts`` are rank 0's."""

    folder: StepFolder
    weights: WeightParts
    pieces: list[Piece]
    updates: int
    metadata: AprMetadata | None
    state: SavedState
    facts: CheckpointFacts
    began: float

    def on_host(self) -> _Job:
        """The same with copies of what is trained."""
        pieces = [piece.on_host() for piece in self.pieces]
        return replace(self, weights=self.weights.on_host(), pieces=pieces)

    def copied_bytes(self) -> int:
        """Bytes of those copies."""
        pieces = [*self.pieces, *self.weights.pieces.values()]
        return sum(piece.nbytes for piece in pieces)


class Saver:
    """Writes where a run is; what it wrote last is always whole. Making and leaving one are collectives.

    Args:
        config: the resolved configuration.
        runtime: this rank's view of the processes.
        start: what the run starts from.
        run: the run folder, which every rank sees.
        exchange: the ranks' own group for saving.
        say: prints one line on rank 0.
    """

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        start: Start,
        run: RunFolder,
        exchange: Exchange,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._runtime, self._start = config, runtime, start
        self._run, self._exchange, self._say = run, exchange, say
        self._began = time.perf_counter()
        self._thread: threading.Thread | None = None
        self._error: AprDistError | None = None

    @property
    def failed(self) -> bool:
        """Whether the save under way has failed on this rank; `finish` says how."""
        return self._error is not None

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Save model, optimizer and progress as one step folder; every rank calls this.

        Returns when everything is copied, or, where there is no room for copies, when it is written.

        Raises:
            AprDistError: on every rank, what went wrong in the save before or in this one so far; the
                folder before it is untouched.
        """
        self.finish()
        job = self._job(model, optimizer, progress)
        self._runtime.on_main(lambda: _make(job.folder.path))
        if not self._copies_fit(job):
            self._write(job)
            self.finish()
            return
        job = job.on_host()
        self._thread = threading.Thread(target=self._write, args=(job,), name="saving", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the save under way; every rank calls this.

        Raises:
            AprDistError: on every rank, what went wrong in it.
        """
        if self._thread is not None:
            with HERE.during(Phase.SAVING, step=HERE.step):
                while self._thread.is_alive():
                    self._thread.join(1.0)
                    HERE.moved_at = max(HERE.moved_at, self._exchange.moved_at)
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        elif self._thread is not None:  # another error ends the run: the save under way gets a moment
            self._thread.join(LEAVING_S)

    def best(self) -> tuple[StepFolder, float] | None:
        """The saved step with the lowest validation loss, and that loss; rank 0 alone."""
        found = best(self._run, self._start.provenance.get("evaluation"))
        return found[0] if found else None

    def hand_over(self, folder: StepFolder) -> None:
        """Let the run's checkpoint be a saved step's, and the facts beside it too; rank 0 alone.

        Raises:
            AprDistError: the step cannot be read or the files cannot be written.
        """
        state = read_state(folder, verify=False)
        self._run.hand_over(folder)
        facts = CheckpointFacts(
            epoch=state.evaluation_number,
            step=state.step,
            train_loss=state.train_loss,
            val_loss=state.val_loss,
            train_ppl=perplexity(state.train_loss),
            val_ppl=perplexity(state.val_loss),
            optimizer_state_sha=state.optimizer_digest,
            wall_seconds=time.perf_counter() - self._began,
            tokens_seen=state.tokens_seen,
            grad_norm_max=state.grad_norm_max,
        )
        write_atomically(self._run.checkpoint_facts, json_bytes(asdict(facts)))

    def _copies_fit(self, job: _Job) -> bool:
        """Whether every rank has room for its copies; a collective."""
        local = read_launch().local_world_size
        needed = ROOM * job.copied_bytes() * local
        short = not self._config.checkpoint.background or psutil.virtual_memory().available < needed
        count = torch.tensor([int(short)], dtype=torch.int64, device=self._runtime.device)
        return not int(self._runtime.sum(count))

    def _job(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> _Job:
        began = time.perf_counter()
        metadata = None
        if self._runtime.is_main:
            start, provenance = self._start, self._provenance(progress)
            if start.adapter is None:
                metadata = checkpoint_metadata(start.model_config, start.metadata, provenance)
            else:
                metadata = adapter_metadata(start.model_config, start.adapter, provenance)
        return _Job(
            folder=self._run.step(progress.step),
            weights=weight_parts(model, self._runtime),
            pieces=[*moment_pieces(model, optimizer, self._runtime), *random_pieces(self._runtime.device)],
            updates=updates_done(optimizer),
            metadata=metadata,
            state=self._state(progress),
            facts=self._facts(progress),
            began=began,
        )

    def _write(self, job: _Job) -> None:
        """Write, prove and declare whole; what goes wrong is kept for `finish`, the same on every rank."""
        try:
            self._write_files(job)
        except AprDistError as error:
            self._error = error
        except Exception as error:  # of a thread, where it would be lost
            self._error = DistributedError(
                f"saving ended with {type(error).__name__}: {' '.join(str(error).split())[:500]}",
                where=job.folder.path,
                remedy="check that every rank still runs, and go on with --resume auto",
            )

    def _write_files(self, job: _Job) -> None:
        exchange, target = self._exchange, job.folder.checkpoint
        save_weights(job.weights, target, job.metadata, overwrite=True, exchange=exchange)
        error, written = None, ""
        name = part_name(exchange.rank, exchange.world_size)
        try:
            written = write_part(job.pieces, job.folder.path / name, exchange.moved)
        except AprDistError as refused:
            error = refused
        exchange.agree(error)
        digests = dict(exchange.collect([name, written]))
        if self._runtime.is_main:
            try:
                self._declare(job, digests)
            except AprDistError as refused:
                error = refused
        exchange.agree(error)

    def _declare(self, job: _Job, digests: dict[str, str]) -> None:
        """Write the index, then the marker, then let the oldest folders go; rank 0 alone."""
        index, target = job.folder.index, job.folder.checkpoint
        if self._start.adapter is not None:
            write_peft_folder(target, job.folder.adapter)
        write_atomically(index, index_text(digests, updates=job.updates))
        optimizer_digest = file_digest(index)
        state = replace(job.state, checkpoint_digest=file_digest(target), optimizer_digest=optimizer_digest)
        write_state(job.folder, state)
        self._run.hand_over(job.folder)
        facts = replace(job.facts, optimizer_state_sha=optimizer_digest)
        write_atomically(self._run.checkpoint_facts, json_bytes(asdict(facts)))
        keep = self._config.checkpoint
        retire(
            self._run,
            keep_last=keep.keep_last,
            keep_every=keep.keep_every,
            keep_best=keep.keep_best,
            evaluation=job.state.evaluation,
        )
        took = time.perf_counter() - job.began
        self._say(f"step {job.state.step:>6}  saved {target} ({took:.1f} s, read back)")

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

    def _state(self, progress: Progress) -> SavedState:
        return SavedState(
            step=progress.step,
            tokens_seen=progress.tokens_seen,
            train_loss=progress.train_loss,
            grad_norm_max=progress.grad_norm_max,
            evaluations=[[one.loss, one.tokens] for one in progress.evaluations],
            agreements=[[one.step, one.train_loss, one.eval_loss] for one in progress.agreements],
            config=binding(self._config),
            config_digest=self._config.digest(),
            data_fingerprint=self._start.provenance.get("data_fingerprint"),
            init_digest=self._start.provenance.get("init_digest"),
            first_gates=[gate.to_json() for gate in progress.first_gates],
            evaluated_at=progress.evaluated_at,
            guard=asdict(progress.guard),
            run=self._start.run,
            val_data_fingerprint=self._start.provenance.get("val_data_fingerprint"),
            evaluation=self._start.provenance.get("evaluation"),
            data_origin=list(progress.data_origin),
        )

    def _facts(self, progress: Progress) -> CheckpointFacts:
        return CheckpointFacts(
            epoch=progress.evaluation,
            step=progress.step,
            train_loss=progress.train_loss,
            val_loss=progress.val_loss,
            train_ppl=perplexity(progress.train_loss),
            val_ppl=perplexity(progress.val_loss),
            optimizer_state_sha="",
            wall_seconds=time.perf_counter() - self._began,
            tokens_seen=progress.tokens_seen,
            grad_norm_max=progress.grad_norm_max,
        )


def _make(folder: Path) -> None:
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
