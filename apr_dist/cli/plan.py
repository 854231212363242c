"""The verb that says what a run will be; it takes the trainer's own flags."""

from __future__ import annotations

import argparse
import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import asdict

from apr_dist.config.reading import parse_command_line
from apr_dist.errors import ExitCode, UsageError
from apr_dist.planning.plan import Plan, Rate, make_plan
from apr_dist.planning.plan_text import plan_json, plan_lines
from apr_dist.planning.simulation import simulate, simulation_lines

_FIGURES = (
    ("--memory", "GIB", "memory of one device, to say what fits"),
    ("--tokens-per-second", "N", "speed of the whole run, for its time"),
    ("--mfu", "SHARE", "share of --peak-tflops that is reached, such as 0.4"),
    ("--peak-tflops", "N", "peak of one device in TFLOP/s, such as 989"),
    ("--simulate", "GIB", "every strategy on 8 to 4,096 GPUs of this memory"),
    ("--grace", "S", "seconds between SIGTERM and SIGKILL, to say whether they suffice"),
    ("--disk", "GB_S", "GB a second that a save is written with (default: 0.5)"),
)


def parser() -> argparse.ArgumentParser:
    """The flags of this verb's own; every other is the trainer's."""
    made = argparse.ArgumentParser(
        prog="apr-dist plan",
        description=inspect.getdoc(plan),
        epilog="Every other flag is the trainer's; apr-dist config show lists their keys.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--processes", type=int, default=1, metavar="N", help="processes (default: 1)")
    for flag, unit, text in _FIGURES:
        made.add_argument(flag, type=float, metavar=unit, help=text)
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


def plan(arguments: Sequence[str]) -> int:
    """Show what a run will take and whether its gates pass, without starting it.

    Example: apr-dist plan --config configs/demo.yaml --init model.apr
    """
    given, rest = parser().parse_known_args(list(arguments))
    _check(given)
    peak = None if given.peak_tflops is None else given.peak_tflops * 1e12
    disk = None if given.disk is None else given.disk * 1e9
    rate = Rate(tokens_per_s=given.tokens_per_second, mfu=given.mfu, peak_flops=peak, disk_bytes_per_s=disk)
    memory_bytes = None if given.memory is None else int(given.memory * 2**30)
    config = parse_command_line(rest).config
    made = make_plan(
        config,
        world_size=given.processes,
        rate=rate,
        memory_bytes=memory_bytes,
        grace_s=given.grace,
    )
    if given.simulate is not None:
        return _simulate(made, int(given.simulate * 2**30), as_json=given.json)
    if given.json:
        print(json.dumps(plan_json(made), indent=2))
    else:
        print("\n".join(plan_lines(made)))
    return int(made.refusal.exit_code if made.refusal else ExitCode.OK)


def _simulate(made: Plan, gpu_bytes: int, *, as_json: bool) -> int:
    points = simulate(made.model, made.config, gpu_bytes=gpu_bytes)
    if as_json:
        print(json.dumps([{**asdict(point), "total": point.memory.total} for point in points], indent=2))
    else:
        print("\n".join(simulation_lines(points, gpu_bytes=gpu_bytes)))
    return int(ExitCode.OK)


def _check(given: argparse.Namespace) -> None:
    for name in (
        "processes",
        "memory",
        "tokens_per_second",
        "mfu",
        "peak_tflops",
        "simulate",
        "grace",
        "disk",
    ):
        value = getattr(given, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{name} is {value}", where="command line", expected="a number above 0")
    if (given.mfu is None) != (given.peak_tflops is None):
        raise UsageError(
            "one of --mfu and --peak-tflops is missing", where="command line", expected="both, or neither"
        )
