"""A plan as lines of text, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from apr_dist.choices import Offload
from apr_dist.planning.memory import PARTS
from apr_dist.planning.plan import Plan
from apr_dist.training.schedule import Schedule

_GIB = 1 << 30
_PLOT_COLUMNS, _PLOT_ROWS = 60, 6


def plan_lines(plan: Plan) -> Iterator[str]:
    """The plan, section by section."""
    yield from _sizes(plan)
    yield ""
    yield from _memory_table(plan)
    yield ""
    yield "learning rate"
    yield from lr_plot(plan.schedule)
    yield ""
    yield "gates that can be asked now"
    for gate in plan.gates:
        yield f"  pass  {gate.gate}: {gate.measured}  [{gate.id}]"
    if plan.refusal is not None:
        yield f"  NO    {plan.refusal}"
    later = "weights arrived, step-0 loss, evaluation agrees, final loss"
    if plan.config.init is not None and plan.refusal is None:
        later = f"checksums and every value of the init, {later}"
    yield f"  later: {later}"
    yield ""
    yield f"warnings: {len(plan.warnings)}"
    for warning in plan.warnings:
        yield f"  ! {warning}"


def lr_plot(schedule: Schedule) -> Iterator[str]:
    """The schedule over all steps as a small plot."""
    steps = max(schedule.total_steps, 1)
    points = [schedule.lr_at(column * (steps - 1) // (_PLOT_COLUMNS - 1)) for column in range(_PLOT_COLUMNS)]
    top = max(points)
    heights = [round(point / top * (_PLOT_ROWS - 1)) for point in points]
    for row in range(_PLOT_ROWS - 1, -1, -1):
        label = f"{top * row / (_PLOT_ROWS - 1):.1e}" if row in (0, _PLOT_ROWS - 1) else ""
        yield f"  {label:>8} |" + "".join("*" if height == row else " " for height in heights).rstrip()
    yield f"  {'':>8} +" + "-" * _PLOT_COLUMNS
    last = f"step {steps:,}"
    yield f"  {'':>8}  step 1" + last.rjust(_PLOT_COLUMNS - len("step 1"))


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON values; bytes and seconds."""
    return {
        "parameters": plan.model.parameter_count(),
        "flops_per_token": plan.flops_per_token,
        "tokens_per_step": plan.tokens_per_step,
        "tokens": plan.tokens,
        "tokens_per_parameter": plan.tokens_per_parameter,
        "passes": plan.passes,
        "world_size": plan.world_size,
        "memory_bytes": {
            name.value: {**asdict(one), "total": one.total} for name, one in plan.memory.items()
        },
        "wall_s": plan.wall_s,
        "gates": [gate.to_json() for gate in plan.gates],
        "refusal": str(plan.refusal) if plan.refusal else None,
        "warnings": plan.warnings,
    }


def _sizes(plan: Plan) -> Iterator[str]:
    config, model = plan.config, plan.model
    yield f"model         {model.family} with {model.parameter_count():,} parameters, from {_source(plan)}"
    yield f"work          {plan.flops_per_token / 1e9:,.2f} GFLOP a token, forward and backward"
    yield (
        f"step          {plan.tokens_per_step:,} tokens: {config.batch_size} sequences of"
        f" {config.seq_length:,} over {plan.world_size} process(es)"
    )
    yield (
        f"run           {config.num_steps:,} steps, {plan.tokens:,} tokens,"
        f" {plan.tokens_per_parameter:.3g} a parameter; evaluated every {config.eval_every:,} steps,"
        f" saved every {config.save_period:,}"
    )
    if plan.data is not None and plan.passes is not None:
        yield (
            f"data          {plan.data.tokens:,} tokens, {plan.data.sequences:,} sequences:"
            f" {plan.passes:.2f} pass(es); {plan.data.held_out_sequences:,} sequences held out"
        )
    if plan.wall_s is None:
        yield "time          unknown: give --tokens-per-second, or --mfu with --peak-tflops"
    else:
        yield f"time          {_duration(plan.wall_s)} of steps, evaluations not counted"


def _source(plan: Plan) -> str:
    return str(plan.config.init) if plan.config.init else f"{plan.config.model}, random weights"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _memory_table(plan: Plan) -> Iterator[str]:
    yield "memory of a process in GiB, without Python, libraries and the GPU's context"
    parts = [part for part in PARTS if any(getattr(one, part) for one in plan.memory.values())]
    yield f"  {'':<14}" + "".join(f"{PARTS[part]:>13}" for part in parts) + f"{'fullest':>13}"
    for name, one in plan.memory.items():
        sizes = [*(getattr(one, part) for part in parts), one.total]
        row = "".join(f"{size / _GIB:>13.2f}" for size in sizes)
        beside = f"; {one.host / _GIB:.2f} in host memory" if one.host else ""
        offloads = f", {one.offload} offloaded" if one.offload is not Offload.NONE else ""
        yield f"  {name.value:<14}{row}  at the {one.moment}{beside}{offloads}"
