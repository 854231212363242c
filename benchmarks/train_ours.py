"""A step as the trainer takes and reads it: what ``bench_train`` and ``bench_quick`` call ours.

The engine of a run of one process, its optimizer, its feed and its guards. What is left out is what lies
between steps: lines of metrics and the display.
"""

from __future__ import annotations

import time
from collections import deque

import torch
from train_rivals import BETAS, EPS, GRAD_CLIP, LR, WEIGHT_DECAY, Setting, activation_peak, product_rate
from train_turns import Step

from apr_dist.config.sections import GuardsSection
from apr_dist.data.documents import Documents
from apr_dist.data.mixture import Progress
from apr_dist.model.kernels.products import mm
from apr_dist.model.transformer import Decoder
from apr_dist.parallel import runtime as processes
from apr_dist.parallel.engine import prepare
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.sharding import build_decoder
from apr_dist.parallel.weights import draw_weights
from apr_dist.runs.progress import GuardState
from apr_dist.training.evaluation import split_sequences
from apr_dist.training.optimizer import build_optimizer
from apr_dist.training.step_guard import StepGuard
from apr_dist.training.stepping import BatchFeed, Stepper


class OurStep:
    """The trainer's step over a decoder with random weights of a fixed seed."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        runtime = _start(setting)
        self.model: Decoder = build_decoder(setting.config, runtime)
        draw_weights(self.model, setting.config, runtime, seed=0)
        if setting.compiled:
            self.model.compile_blocks()
        optimizer = build_optimizer(
            self.model, lr=LR, weight_decay=WEIGHT_DECAY, betas=BETAS, eps=EPS, alone=True
        )
        self._engine = prepare(self.model, optimizer, runtime, micro_batch=setting.batch, grad_clip=GRAD_CLIP)
        self._data = _Drawn(setting)
        self._guard = StepGuard(GuardsSection(), batch_size=setting.batch, state=GuardState())
        self._stepper = Stepper(
            engine=self._engine,
            runtime=runtime,
            feed=BatchFeed(self._data, runtime.device),
            lr_at=lambda _: LR,
            global_tokens=setting.batch * setting.seq,
            notes=lambda: torch.zeros(3, dtype=torch.float64, device=runtime.device),  # a save, two signals
            limits=self._guard.limits,
        )
        self._done = 0

    def step(self) -> Step:
        """One optimizer step."""
        self._data.draw_up_to(self._done + 1)
        self._setting.synchronize()
        began = time.perf_counter()
        self._stepper.take(self._done, compare=False, more=True)
        (taken,) = self._stepper.read()
        self._guard.check(batch=self._done, train_loss=taken.train_loss, grad_norm=taken.grad_norm)
        took = time.perf_counter() - began
        self._done += 1
        return Step(took, taken.train_loss, taken.data_wait_s)

    def activation_bytes(self) -> int:
        """Peak of live bytes in one forward and backward, beyond weights, gradients and optimizer state."""
        tokens = self._setting.batches()().int()
        inputs, targets, _ = split_sequences(tokens, self._setting.device, (), None)
        scale = 1 / targets.numel()

        def compute() -> None:
            self._engine.accumulate(inputs, targets, scale=scale, last=True)

        peak = activation_peak(compute, self._setting.device)
        self._engine.optimizer.zero_grad(set_to_none=True)
        return peak

    def product_rate(self) -> float:
        """Operations a second of one large product as our layers multiply, in the type of the setting."""
        return product_rate(mm, self._setting)


class _Drawn:
    """The tokens of a setting as global batches, drawn before the step that asks for them."""

    def __init__(self, setting: Setting) -> None:
        self._draw, self._first = setting.batches(), 0
        self._rows: deque[torch.Tensor] = deque()

    def draw_up_to(self, k: int) -> None:
        """Have global batch ``k`` and those before it at hand."""
        while self._first + len(self._rows) <= k:
            self._rows.append(self._draw().cpu().int())

    def batch(self, k: int) -> list[torch.Tensor]:
        """One micro-batch, int32 ``[batch, seq + 1]``; each is asked for once, in order."""
        if k != self._first:
            raise ValueError(f"batch {k} is asked for after batch {self._first - 1}")
        self._first += 1
        return [self._rows.popleft()]

    def progress(self, batches: int) -> dict[str, Progress]:  # noqa: ARG002
        """No source is counted."""
        return {}

    def documents(self, k: int) -> list[Documents]:  # noqa: ARG002
        """None: tokens are not packed."""
        return []


def our_weights(setting: Setting) -> dict[str, torch.Tensor]:
    """The weights that `OurStep` begins with, for the others."""
    runtime = _start(setting)
    model: Decoder = build_decoder(setting.config, runtime)
    draw_weights(model, setting.config, runtime, seed=0)
    processes.reset_state()  # Trainer makes an Accelerator of its own, with a state of its own
    return model.state_dict()


def _start(setting: Setting) -> Runtime:
    processes.reset_state()
    return processes.start(
        device=setting.device.type,
        strategy="single",
        precision="bf16" if setting.dtype is torch.bfloat16 else "f32",
        cpu_threads=torch.get_num_threads(),
        timeout_s=600,
    )
