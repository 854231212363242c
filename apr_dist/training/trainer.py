"""The loop: evaluate, step, evaluate, save, and say how it ended.

What a step is reads top to bottom in ``Trainer._step``. Processes, weights, guards, metrics and the
verdict live in their own rooms; nothing here opens a model file or parses a flag.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from apr_dist.apr.metadata import AprMetadata
from apr_dist.config import TrainConfig
from apr_dist.gates.result import GateResult
from apr_dist.model.config import TransformerConfig
from apr_dist.parallel.runtime import Runtime, assert_wrapped
from apr_dist.parallel.weights import model_digest
from apr_dist.training.checkpoint import (
    CheckpointFacts,
    checkpoint_metadata,
    perplexity,
    write_checkpoint,
)
from apr_dist.training.evaluation import Evaluation, evaluate, split_sequences
from apr_dist.training.guards import EarlyStop, check_finite, check_validation
from apr_dist.training.metrics import MetricsFile, StepMetrics, gpu_utilisation
from apr_dist.training.optimizer import apply_lr, build_optimizer, optimizer_state_digest
from apr_dist.training.schedule import Schedule
from apr_dist.training.verdict import (
    Agreement,
    Status,
    evaluation_gates,
    final_gates,
    refuse_failed,
    step_zero_gates,
)

LR_FLOOR = 1e-7
"""The cosine never ends below this."""


class TrainingData(Protocol):
    """Global batches by number: this rank's micro-batches, each int32 [micro_batch, seq + 1]."""

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences of one pass over the data."""

    def batch(self, k: int) -> list[torch.Tensor]:
        """This rank's micro-batches of global batch ``k``."""


@dataclass(frozen=True)
class Start:
    """What a run starts from, as rank 0 proved it.

    Attributes:
        model_config: architecture of the decoder.
        from_init: whether its weights came from a file.
        metadata: metadata of that file (None from scratch and on other ranks).
        provenance: facts for the checkpoint's metadata.
        recorded_val_loss: what the file says the same evaluation gave when it was saved, if it does.
    """

    model_config: TransformerConfig
    from_init: bool
    metadata: AprMetadata | None
    provenance: dict[str, Any]
    recorded_val_loss: float | None = None


@dataclass
class Progress:
    """Where a run is; the only state of the loop besides model and optimizer."""

    step: int = 0
    epoch: int = 0
    tokens_seen: int = 0
    train_loss: float | None = None
    grad_norm_max: float = 0.0
    data_epoch: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the loop ended."""

    status: Status
    detail: str
    gates: list[GateResult]
    facts: dict[str, Any]


class Trainer:
    """One run over prepared processes, data and weights.

    Args:
        config: the resolved configuration.
        runtime: this rank's view of the processes.
        model: the bare decoder, its weights in place.
        start: what it starts from.
        train_data: global batches by number.
        eval_data: this rank's share of the held-out sequences, iterated once an evaluation.
        metrics: where lines go.
        say: prints one line on rank 0.
    """

    def __init__(
        self,
        *,
        config: TrainConfig,
        runtime: Runtime,
        model: nn.Module,
        start: Start,
        train_data: TrainingData,
        eval_data: Iterable[torch.Tensor],
        metrics: MetricsFile,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.runtime, self.start = config, runtime, start
        self.train_data, self.eval_data = train_data, eval_data
        self.metrics, self.say = metrics, say
        self.model = model
        self.progress = Progress()
        self.began = time.perf_counter()
        options = config.optimizer
        optimizer = build_optimizer(
            model,
            lr=config.peak_lr,
            weight_decay=options.weight_decay,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
        )
        self.schedule = Schedule(
            peak_lr=config.peak_lr,
            warmup_steps=config.warmup,
            total_steps=config.num_steps,
            lr_min=max(config.peak_lr * options.lr_min_ratio, LR_FLOOR),
        )
        self.wrapped, self.optimizer = self._prepare(model, optimizer)

    def fit(self, run_dir: Path) -> Outcome:
        """Train to the end of the steps, the target, or the patience, saving at every evaluation.

        Raises:
            LossRefused, Divergence, NumericalInstability, DataError, OutputError: see ``guards`` and
                ``verdict``; the last checkpoint that was written stays whole.
        """
        gates = self._step_zero()
        stop = EarlyStop(self.config.early_stop.patience, self.config.early_stop.min_epochs)
        status, detail = Status.COMPLETED, f"all {self.config.num_steps} steps done"
        stop = stop.after(self.progress.evaluations[0].loss)
        if self.config.num_steps == 0:
            self._save(run_dir)
        while self.progress.step < self.config.num_steps:
            self._epoch()
            stop = stop.after(self._evaluate().loss)
            self._save(run_dir)
            ended = self._ended(stop)
            if ended is not None:
                status, detail = ended
                break
        return self._outcome(status, detail, gates)

    def _prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, AcceleratedOptimizer]:
        wrapped, prepared = self.runtime.accelerator.prepare(model, optimizer)
        assert_wrapped(wrapped, self.runtime.strategy)
        return wrapped, prepared

    def _step_zero(self) -> list[GateResult]:
        first = self._evaluate()
        if self.config.synthetic:
            return []
        gates = step_zero_gates(
            first.loss,
            vocab_size=self.start.model_config.vocab_size,
            from_init=self.start.from_init,
            recorded=self.start.recorded_val_loss,
        )
        refuse_failed(gates, where=str(self.config.init or self.config.model))
        return gates

    def _epoch(self) -> None:
        last = min(self.progress.step + self.config.steps_per_epoch, self.config.num_steps)
        while self.progress.step < last:
            self._step(compare=self.progress.step in (0, self.config.num_steps - 1))
        self.progress.epoch += 1

    def _step(self, *, compare: bool) -> None:
        began = time.perf_counter()
        step, config = self.progress.step, self.config
        micro_batches = self.train_data.batch(step)
        data_wait_s = time.perf_counter() - began
        eval_loss = evaluate(self.model, micro_batches, self.runtime).loss if compare else None
        computed = time.perf_counter()
        lr = apply_lr(self.optimizer, self.schedule.lr_at(step))
        train_loss = self._forward_backward(micro_batches)
        norm = self.runtime.accelerator.clip_grad_norm_(self.wrapped.parameters(), config.optimizer.grad_clip)
        grad_norm = float(norm)
        check_finite(step=step + 1, train_loss=train_loss, grad_norm=grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        wall_s = time.perf_counter() - computed + data_wait_s
        self._record(train_loss, grad_norm, lr, wall_s, data_wait_s)
        if eval_loss is not None:
            self.progress.agreements.append(
                Agreement(step=step + 1, train_loss=train_loss, eval_loss=eval_loss)
            )

    def _forward_backward(self, micro_batches: Sequence[torch.Tensor]) -> float:
        # Gradients are those of (sum of token losses) / (tokens of the global batch). DDP averages
        # over ranks, so each rank's share is scaled by the world size first.
        global_tokens = self.config.batch_size * self.config.seq_length
        scale = self.runtime.world_size / global_tokens
        total = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        self.wrapped.train()
        for index, tokens in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            no_sync = self.runtime.accelerator.no_sync(self.wrapped)
            with contextlib.nullcontext() if last else no_sync:
                loss_sum, _ = self.wrapped(*split_sequences(tokens, self.runtime.device))
                self.runtime.accelerator.backward(loss_sum * scale)
            total += loss_sum.detach().double()
        return float(self.runtime.sum(total)) / global_tokens

    def _record(
        self, train_loss: float, grad_norm: float, lr: float, wall_s: float, data_wait_s: float
    ) -> None:
        state, config = self.progress, self.config
        global_tokens = config.batch_size * config.seq_length
        state.step += 1
        state.tokens_seen += global_tokens
        state.train_loss = train_loss
        state.grad_norm_max = max(state.grad_norm_max, grad_norm)
        data_epoch = (state.step * config.batch_size - 1) // self.train_data.sequences_per_epoch
        if data_epoch > state.data_epoch:
            self.say(f"training data: pass {data_epoch + 1} begins (every sequence seen {data_epoch} times)")
            state.data_epoch = data_epoch
        line = StepMetrics(
            step=state.step,
            train_loss=train_loss,
            grad_norm=grad_norm,
            lr=lr,
            tokens_per_sec=global_tokens / wall_s,
            gpu_util_pct=gpu_utilisation(self.runtime.device),
            wall_ms=wall_s * 1e3,
            data_wait_ms=data_wait_s * 1e3,
            tokens_seen=state.tokens_seen,
            data_epoch=state.data_epoch,
        )
        self.metrics.step(line)
        self.say(
            f"step {line.step:>6}/{config.num_steps}  loss {train_loss:.4f}  grad_norm {grad_norm:.3f}"
            f"  lr {lr:.2e}  {line.tokens_per_sec:,.0f} tokens/s  gpu {line.gpu_util_pct:.0f} %"
        )

    def _evaluate(self) -> Evaluation:
        state = self.progress
        result = evaluate(
            self.model,
            self.eval_data,
            self.runtime,
            progress=lambda done, of: self.say(f"  evaluating: {done} of {of} batches"),
        )
        self.metrics.event(
            "evaluation",
            {
                "step": state.step,
                "epoch": state.epoch,
                "val_loss": result.loss if torch.isfinite(torch.tensor(result.loss)) else None,
                "val_ppl": perplexity(result.loss),
                "tokens": result.tokens,
                "wall_ms": result.wall_s * 1e3,
            },
        )
        self.say(f"step {state.step:>6}  validation loss {result.loss:.4f} over {result.tokens:,} tokens")
        check_validation(
            val_loss=result.loss,
            previous=state.evaluations[-1].loss if state.evaluations else None,
            vocab_size=self.start.model_config.vocab_size,
            from_scratch=not self.start.from_init,
            epoch=len(state.evaluations),
        )
        state.evaluations.append(result)
        return result

    def _ended(self, stop: EarlyStop) -> tuple[Status, str] | None:
        state = self.progress
        loss = state.evaluations[-1].loss
        if loss <= self.config.target and state.epoch >= self.config.early_stop.min_epochs:
            return Status.OK, f"validation loss {loss:.4f} reached the target {self.config.target}"
        if stop.stops(state.epoch):
            return (
                Status.EARLY_STOP,
                f"best validation loss {stop.best:.4f}; {stop.without_improvement} without improvement",
            )
        return None

    def _save(self, run_dir: Path) -> None:
        state, start = self.progress, self.start
        val_loss = state.evaluations[-1].loss
        facts = CheckpointFacts(
            epoch=state.epoch,
            step=state.step,
            train_loss=state.train_loss,
            val_loss=val_loss,
            train_ppl=perplexity(state.train_loss),
            val_ppl=perplexity(val_loss),
            optimizer_state_sha=optimizer_state_digest(self.optimizer.optimizer),
            wall_seconds=time.perf_counter() - self.began,
            tokens_seen=state.tokens_seen,
            grad_norm_max=state.grad_norm_max,
        )
        provenance = {
            **start.provenance,
            "step": state.step,
            "tokens_seen": state.tokens_seen,
            "train_loss": state.train_loss,
            "val_loss": val_loss,
            "config_digest": self.config.digest(),
            "synthetic": True if self.config.synthetic else None,
        }

        def write() -> None:
            metadata = checkpoint_metadata(start.model_config, start.metadata, provenance)
            path = write_checkpoint(self.model, run_dir, metadata, facts)
            self.say(f"step {state.step:>6}  checkpoint {path} written and read back")

        self.runtime.on_main(write)

    def _outcome(self, status: Status, detail: str, gates: list[GateResult]) -> Outcome:
        state, config = self.progress, self.config
        if not config.synthetic:
            val_loss = state.evaluations[-1].loss
            gates = gates + evaluation_gates(state.agreements, val_loss=val_loss, train_loss=state.train_loss)
            gates = gates + final_gates(
                first_val_loss=state.evaluations[0].loss,
                val_loss=val_loss,
                target=config.target,
                finetune=self.start.from_init,
                steps=state.step,
            )
        facts = {
            "steps": state.step,
            "tokens_seen": state.tokens_seen,
            "train_loss": state.train_loss,
            "val_losses": [result.loss for result in state.evaluations],
            "wall_seconds": time.perf_counter() - self.began,
            "weights_digest": model_digest(self.model),
            "strategy": self.runtime.strategy.value,
            "world_size": self.runtime.world_size,
        }
        return Outcome(status=status, detail=detail, gates=gates, facts=facts)
