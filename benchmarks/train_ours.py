"""A step as the trainer takes and reads it: what ``bench_train`` and ``bench_quick`` call ours.

It is the step of a session of one process, with its guards. What is left out is what lies between steps: the
lines of metrics are not written, and nothing is displayed.
"""

from __future__ import annotations

import sys
import time
from collections import deque

import torch
from train_rivals import BETAS, EPS, GRAD_CLIP, LR, WEIGHT_DECAY, Setting, activation_peak, product_rate
from train_turns import Step

from apr_dist.model.kernels.products import mm
from apr_dist.model.transformer import Decoder
from apr_dist.parallel import runtime as processes
from apr_dist.parallel.sharding import build_decoder
from apr_dist.parallel.weights import draw_weights
from apr_dist.training.evaluation import split_sequences
from apr_dist.training.library import without_gates
from apr_dist.training.session import Session

OPTIMIZER = {
    "weight_decay": WEIGHT_DECAY,
    "beta1": BETAS[0],
    "beta2": BETAS[1],
    "eps": EPS,
    "grad_clip": GRAD_CLIP,
    "schedule": "constant",
}


class OurStep:
    """The trainer's step over a decoder with random weights of a fixed seed."""

    def __init__(self, setting: Setting) -> None:
        processes.reset_state()
        self._setting, self._data = setting, _Drawn(setting)
        opened = without_gates(
            setting.config,
            batches=self._data,
            batch_size=setting.batch,
            seq_length=setting.seq,
            num_steps=sys.maxsize,
            lr=LR,
            warmup_steps=0,
            seed=0,
            device=setting.device.type,
            optimizer=OPTIMIZER,
            compute={"compile": "block" if setting.compiled else "off"},
            parallel={"precision": _precision(setting), "cpu_threads": torch.get_num_threads()},
        )
        self._session = Session(*opened)
        self.model: Decoder = self._session.model
        self._done = 0

    def step(self) -> Step:
        """One optimizer step."""
        self._data.have(2)  # the next batch may be sent ahead
        stepper = self._session.stepper
        self._setting.synchronize()
        began = time.perf_counter()
        stepper.take(self._done, compare=False, more=True)
        (taken,) = stepper.read()
        self._session.recorder.judge(taken, 0.0)
        took = time.perf_counter() - began
        self._done += 1
        return Step(took, taken.train_loss, taken.data_wait_s)

    def activation_bytes(self) -> int:
        """Peak of live bytes in one forward and backward, beyond weights, gradients and optimizer state."""
        tokens = self._setting.batches()().int()
        inputs, targets, _ = split_sequences(tokens, self._setting.device, (), None)
        scale, engine = 1 / targets.numel(), self._session.engine

        def compute() -> None:
            engine.accumulate(inputs, targets, scale=scale, last=True)

        peak = activation_peak(compute, self._setting.device)
        engine.optimizer.zero_grad(set_to_none=True)
        return peak

    def product_rate(self) -> float:
        """Operations a second of one large product as our layers multiply, in the type of the setting."""
        return product_rate(mm, self._setting)


class _Drawn:
    """The tokens of a setting as global batches, drawn before the step that asks for them."""

    def __init__(self, setting: Setting) -> None:
        self._draw = setting.batches()
        self._rows: deque[torch.Tensor] = deque()

    def have(self, count: int) -> None:
        """Have that many batches at hand."""
        while len(self._rows) < count:
            self._rows.append(self._draw().cpu().int())

    def __iter__(self) -> _Drawn:
        return self

    def __next__(self) -> torch.Tensor:
        return self._rows.popleft()


def our_weights(setting: Setting) -> dict[str, torch.Tensor]:
    """The weights that `OurStep` begins with, for the others.

    No session is opened for them: it would change how the process of another handles its memory.
    """
    processes.reset_state()
    runtime = processes.start(
        device=setting.device.type,
        strategy="single",
        precision=_precision(setting),
        cpu_threads=torch.get_num_threads(),
        timeout_s=600,
    )
    model: Decoder = build_decoder(setting.config, runtime)
    draw_weights(model, setting.config, runtime, seed=0)
    processes.reset_state()  # Trainer makes an Accelerator of its own, with a state of its own
    return model.state_dict()


def _precision(setting: Setting) -> str:
    return "bf16" if setting.dtype is torch.bfloat16 else "f32"
