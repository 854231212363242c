"""A plan as lines of text, and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from apr_dist.choices import Offload
from apr_dist.planning.memory import PARTS, Memory
from apr_dist.planning.plan import Plan
from apr_dist.training.schedule import Schedule

_GIB = 1 << 30
_COLUMNS = 80
_PLOT_COLUMNS, _PLOT_ROWS = 60, 6


def plan_lines(plan: Plan) -> Iterator[str]:
    """The plan, section by section, in 80 columns, and what follows from it."""
    for line in _sizes(plan):
        yield from _wrapped(line, indent=14)
    yield ""
    yield from _memory_table(plan)
    yield ""
    yield "learning rate"
    yield from lr_plot(plan.schedule)
    yield ""
    yield "gates that can be asked now"
    for gate in plan.gates:
        yield from _wrapped(f"  pass  {gate.gate}: {gate.measured} [{gate.id}]", indent=8)
    if plan.refusal is not None:
        yield from _wrapped(f"  NO    {plan.refusal}", indent=8)
    later = "weights arrived, step-0 loss, evaluation agrees, final loss"
    if plan.config.init is not None and plan.refusal is None:
        later = f"checksums and every value of the init, {later}"
    yield from _wrapped(f"  later: {later}", indent=9)
    yield ""
    yield f"warnings: {len(plan.warnings)}"
    for warning in plan.warnings:
        yield from _wrapped(f"  ! {warning}", indent=4)
    yield ""
    yield from _wrapped(_conclusion(plan), indent=2)


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
        "trained_parameters": plan.trained_parameters,
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
        "stop": {
            **asdict(plan.stop),
            "needed_s": plan.stop.needed_s,
            "advised_s": plan.stop.advised_s,
            "suffices": plan.stop.suffices,
        },
        "fits": None
        if plan.memory_bytes is None
        else {name.value: one.total <= plan.memory_bytes for name, one in plan.memory.items()},
        "gates": [gate.to_json() for gate in plan.gates],
        "refusal": str(plan.refusal) if plan.refusal else None,
        "warnings": plan.warnings,
    }


def _sizes(plan: Plan) -> Iterator[str]:
    config, model = plan.config, plan.model
    yield f"model         {model.family} with {model.parameter_count():,} parameters, from {_source(plan)}"
    if config.adapter.is_on:
        share = plan.trained_parameters / model.parameter_count()
        yield (
            f"adapter       {config.adapter.kind} of rank {config.adapter.rank}:"
            f" {plan.trained_parameters:,} parameters are trained ({share:.3%}), the others frozen"
        )
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
    yield from plan.stop.lines()


def _source(plan: Plan) -> str:
    return str(plan.config.init) if plan.config.init else f"{plan.config.model}, random weights"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _memory_table(plan: Plan) -> Iterator[str]:
    chosen, *others = plan.memory
    one = plan.memory[chosen]
    yield "memory of one process in GiB, without Python, libraries and the GPU's context"
    yield from _wrapped(f"  {chosen.value}: {_at_most(one)}", indent=4)
    for part, (name, what) in PARTS.items():
        if size := getattr(one, part):
            yield f"    {name:<20}{size / _GIB:>8.2f}  {what}"
    for name, size in one.host_parts.items():
        yield f"    {name:<20}{size / _GIB:>8.2f}  in host memory"
    if others:
        yield "  with another strategy"
    for other in others:
        yield from _wrapped(f"    {other.value:<15}{_at_most(plan.memory[other])}", indent=19)


def _at_most(one: Memory) -> str:
    beside = f"; {one.host / _GIB:.2f} in host memory" if one.host else ""
    offloads = f", {one.offload} offloaded" if one.offload is not Offload.NONE else ""
    return f"{one.total / _GIB:.2f} at the {one.moment}{beside}{offloads}"


def _conclusion(plan: Plan) -> str:
    if plan.refusal is not None:
        return "The run would be refused; see NO above."
    if plan.memory_bytes is None:
        return "The gates that can be asked now pass. --memory GIB says what fits on a device."
    fits = [name.value for name, one in plan.memory.items() if one.total <= plan.memory_bytes]
    others = [name.value for name in plan.memory if name.value not in fits]
    size = f"{plan.memory_bytes / _GIB:g} GiB"
    return "; ".join(
        [f"Fits in {size}: {', '.join(fits) or 'nothing'}"]
        + ([f"does not fit: {', '.join(others)}"] if others else [])
    )


def _wrapped(text: str, *, indent: int) -> list[str]:
    """A line in 80 columns; what does not fit goes on under an indent, and no word is cut."""
    head = text[: len(text) - len(text.lstrip())]
    return textwrap.wrap(
        text.strip(),
        _COLUMNS,
        initial_indent=head,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )
