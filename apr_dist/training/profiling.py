"""Where a training step goes: phases by the clock, operators by PyTorch's profiler, a trace to open.

A few steps are taken exactly as a run takes them, but nothing is evaluated or saved. What a profile is
of, is the configuration it was given; the page it leaves is made here too.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from apr_dist.atomic_files import write_atomically
from apr_dist.choices import Documents
from apr_dist.config import TrainConfig
from apr_dist.gates.preflight import Preflight
from apr_dist.model.packing import Boundaries
from apr_dist.parallel import runtime as processes
from apr_dist.parallel.engine import Engine, prepare
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.sharding import build_decoder
from apr_dist.parallel.weights import draw_weights, load_weights
from apr_dist.runs.display import Display
from apr_dist.training.compute import set_up_compute, set_up_machine
from apr_dist.training.efficiency import Efficiency, efficiency_of, peak_bytes
from apr_dist.training.evaluation import Batch
from apr_dist.training.garbage import collected_on_request
from apr_dist.training.optimizer import build_optimizer
from apr_dist.training.run_data import open_data
from apr_dist.training.schedule import schedule_of
from apr_dist.training.stepping import BatchFeed, Stepper

TRACE_NAME, SUMMARY_NAME = "trace.json", "summary.md"
WARM_UP_STEPS, TRACED_STEPS = 2, 2
TOP_OPERATORS = 12
PHASES = ("data", "forward", "loss", "backward", "update", "other")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Where the steps went.

    Attributes:
        seconds: mean seconds of a step, by phase; together the whole step.
        operators: (name, seconds of a step in the operator itself, calls a step), the longest first.
        tokens_per_sec: target tokens over the seconds of a step.
        mfu: share of the device's peak; None where that is not known.
        peak_bytes: most memory held, of the device's tensors or of the process.
        steps: how many steps the phases were measured over.
        about: what was measured and where, in one line.
        formula: how MFU is worked out, with its numbers.
    """

    seconds: dict[str, float]
    operators: list[tuple[str, float, float]]
    tokens_per_sec: float
    mfu: float | None
    peak_bytes: int
    steps: int
    about: str
    formula: str

    def page(self) -> str:
        """The summary, as Markdown that reads well as text."""
        step = sum(self.seconds.values())
        mfu = "n/a" if self.mfu is None else f"{100 * self.mfu:.1f} %"
        lines = [
            "# Where a step went",
            "",
            self.about,
            "",
            f"{step * 1e3:,.1f} ms a step (mean of {self.steps}), {self.tokens_per_sec:,.0f} tokens/s,"
            f" MFU {mfu}, peak memory {self.peak_bytes / 2**30:,.2f} GiB",
            "",
            "| phase | ms a step | share |",
            "|---|---|---|",
            *(
                f"| {name} | {self.seconds[name] * 1e3:,.1f} | {100 * self.seconds[name] / step:.1f} % |"
                for name in PHASES
            ),
            "",
            "| operator | ms a step, itself | calls a step |",
            "|---|---|---|",
            *(f"| {name} | {seconds * 1e3:,.1f} | {calls:,.0f} |" for name, seconds, calls in self.operators),
            "",
            f"{self.formula}",
            "",
            "`loss` holds the head and its gradients; in a run's metrics.jsonl it is a part of `forward_ms`.",
            f"Open `{TRACE_NAME}` in Perfetto or chrome://tracing.",
        ]
        return "\n".join(lines) + "\n"


def profile_run(config: TrainConfig, preflight: Preflight, *, steps: int, display: Display) -> Profile:
    """Take steps as the configuration says, and leave a trace and a summary in its ``run_dir``.

    Args:
        config: the resolved configuration; one process.
        preflight: its proven inputs.
        steps: how many to measure, after two of warm-up.
        display: told what happens.

    Raises:
        AprDistError: whatever would stop the run.
    """
    options = config.parallel
    runtime = processes.start(
        device=config.device,
        strategy=options.strategy,
        precision=options.precision,
        cpu_threads=options.cpu_threads,
        timeout_s=options.timeout_s,
        state_bits=config.optimizer.state_bits,
    )
    about = set_up_machine(config, runtime)
    with contextlib.ExitStack() as stack:
        stack.enter_context(collected_on_request())
        work = _Work(config, preflight, runtime, stack, display)
        work.take(WARM_UP_STEPS)
        work.clock.seconds.clear()
        wall_s = work.take(steps)
        seconds = {name: work.clock.seconds[name] / steps for name in PHASES}
        seconds["other"] = wall_s / steps - sum(seconds.values())
        most = peak_bytes(runtime.device)  # before the profiler takes its own
        display(f"measured {steps} steps; tracing {TRACED_STEPS} more")
        traced = work.trace(config.run_dir / TRACE_NAME)
    speed = config.batch_size * config.seq_length * steps / wall_s
    found = Profile(
        seconds=seconds,
        operators=traced,
        tokens_per_sec=speed,
        mfu=work.efficiency.mfu(speed),
        peak_bytes=most,
        steps=steps,
        about=_about(config, work.model, about),
        formula=work.efficiency.describe(),
    )
    write_atomically(config.run_dir / SUMMARY_NAME, found.page().encode())
    return found


def _about(config: TrainConfig, model: nn.Module, machine: str) -> str:
    count = sum(weight.numel() for weight in model.parameters())
    return (
        f"{count:,} parameters, {config.batch_size} x {config.seq_length} tokens a step in micro-batches of"
        f" {config.micro_batch(1)}, PyTorch {torch.__version__}; {machine}"
    )


class _Clock:
    """Seconds by phase, one at a time, each a range of the trace too.

    Waits for the device between phases, so that its work is counted where it was asked.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.seconds: dict[str, float] = defaultdict(float)
        self._phase, self._began = "", 0.0
        self._range: record_function | None = None

    def now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def enter(self, phase: str) -> None:
        """End the phase before, and begin this one; none for an empty name."""
        now = self.now()
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self.seconds[self._phase] += now - self._began
        self._phase, self._began = phase, now
        self._range = record_function(phase) if phase else None
        if self._range is not None:
            self._range.__enter__()  # type: ignore[no-untyped-call]


class _TimedFeed(BatchFeed):
    clock: _Clock

    def take(self, k: int) -> list[Batch]:
        self.clock.enter("data")
        batches = super().take(k)
        self.clock.enter("")
        return batches

    def send_ahead(self, k: int) -> None:
        """Nothing: copies would hide in another phase."""


class _TimedEngine(Engine):
    """An engine whose calls are timed; what follows the network's forward is backward."""

    def __init__(self, inner: Engine, clock: _Clock) -> None:
        self._inner, self._clock = inner, clock
        self.optimizer, self.evaluated, self.evidence = inner.optimizer, inner.evaluated, inner.evidence
        self.clock = inner.clock

    def accumulate(
        self,
        inputs: Tensor,
        targets: Tensor,
        document_ids: Boundaries | None = None,
        *,
        scale: float | Tensor,
        last: bool,
    ) -> Tensor:
        """See `Engine.accumulate`."""
        self._clock.enter("forward")
        loss = self._inner.accumulate(inputs, targets, document_ids, scale=scale, last=last)
        self._clock.enter("")
        return loss

    def step(self, hold: Tensor, norm_limit: float = math.inf) -> Tensor:
        """See `Engine.step`."""
        self._clock.enter("update")
        norm = self._inner.step(hold, norm_limit)
        self._clock.enter("")
        return norm


class _Work:
    """What a run holds while it steps."""

    def __init__(
        self,
        config: TrainConfig,
        preflight: Preflight,
        runtime: Runtime,
        stack: contextlib.ExitStack,
        display: Display,
    ) -> None:
        self.model = build_decoder(preflight.model_config, runtime)
        if preflight.reader is not None:
            load_weights(self.model, preflight.reader, runtime)
        else:
            draw_weights(self.model, preflight.model_config, runtime, seed=config.seed)
        self.efficiency: Efficiency = efficiency_of(preflight.model_config, config, runtime)
        self.clock = _Clock(runtime.device)
        data, _ = open_data(config, preflight.model_config, runtime, stack, display)
        set_up_compute(self.model, config, runtime.device)
        options = config.optimizer
        optimizer = build_optimizer(
            self.model,
            lr=config.peak_lr,
            weight_decay=options.weight_decay,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            state_bits=options.state_bits,
        )
        micro_batch = config.micro_batch_size or config.batch_size
        engine = prepare(self.model, optimizer, runtime, micro_batch=micro_batch, grad_clip=options.grad_clip)
        _time_forward(self.model, self.clock)
        ignored, isolate = config.loader.ignored_ids, config.loader.documents is Documents.ISOLATE
        feed = _TimedFeed(data, runtime.device, ignored_ids=ignored, isolate=isolate)
        feed.clock = self.clock
        self._done, self._cuda = 0, runtime.device.type == "cuda"
        self._stepper = Stepper(
            engine=_TimedEngine(engine, self.clock),
            runtime=runtime,
            feed=feed,
            lr_at=schedule_of(config).lr_at,
            global_tokens=None if ignored else config.batch_size * config.seq_length,
            notes=lambda: torch.zeros(0, dtype=torch.float64, device=runtime.device),
        )

    def take(self, steps: int) -> float:
        """Take that many steps more; their seconds."""
        began = self.clock.now()
        for _ in range(steps):
            self._stepper.take(self._done, compare=False, more=False)
            self._done += 1
        self._stepper.read()
        return self.clock.now() - began

    def trace(self, path: Path) -> list[tuple[str, float, float]]:
        """Take two more steps under PyTorch's profiler, write what it saw, and name the longest operators."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        with profile(activities=activities) as profiler:
            self.take(TRACED_STEPS)
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        # On a GPU the kernels alone: an operator's row holds the time of those it launched once more.
        kind = "CUDA" if self._cuda else "CPU"
        rows: list[Any] = [
            row
            for row in profiler.key_averages()
            if row.key not in PHASES and row.device_type.name == kind and not row.is_user_annotation
        ]

        def itself(row: Any) -> float:
            return float(row.self_device_time_total if self._cuda else row.self_cpu_time_total)

        longest = sorted(rows, key=itself, reverse=True)[:TOP_OPERATORS]
        return [
            (row.key.replace("|", "/"), itself(row) / 1e6 / TRACED_STEPS, row.count / TRACED_STEPS)
            for row in longest
        ]


def _time_forward(model: nn.Module, clock: _Clock) -> None:
    """The network's last hidden states end forward, the rest of its call is loss, and then comes backward."""

    def left(*_: Any) -> None:
        clock.enter("loss")

    def lost(*_: Any) -> None:
        clock.enter("backward")

    backbone: Any = model.model
    backbone.register_forward_hook(left)
    model.register_forward_hook(lost)
