"""The verb that says what a run will be; it takes the trainer's own flags."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from apr_dist.atomic_files import write_atomically
from apr_dist.config.reading import parse_command_line
from apr_dist.config.text import commented_yaml
from apr_dist.errors import ExitCode, UsageError
from apr_dist.gates.host_memory import check_host_memory
from apr_dist.planning.fitting import lines_of
from apr_dist.planning.plan import Plan, Rate, fitting, make_plan
from apr_dist.planning.plan_text import plan_json, plan_lines
from apr_dist.planning.simulation import simulate, simulation_lines

RTX_4090_FLOPS = 165.2e12
"""bf16 with f32 sums, dense, as its maker states; where --peak-tflops is not given."""

MFU = 0.4
"""Share of the peak that is reached where --mfu is not given."""

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
    made.add_argument(
        "--fit", type=_bytes, metavar="SIZE", help="find what fits one card, such as 24GiB, most quickly"
    )
    made.add_argument(
        "--host", type=_bytes, metavar="SIZE", help="host memory for what leaves the card, such as 64GiB"
    )
    made.add_argument(
        "--write", type=Path, metavar="PATH", help="with --fit: write the configuration that does it"
    )
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
    if given.fit is not None:
        return _fit(made, given)
    if given.host is not None:
        check_host_memory(
            made.model,
            made.config,
            world_size=given.processes,
            processes=given.processes,
            available=given.host,
        )
    if given.simulate is not None:
        return _simulate(made, int(given.simulate * 2**30), as_json=given.json)
    if given.json:
        print(json.dumps(plan_json(made), indent=2))
    else:
        print("\n".join(plan_lines(made)))
    return int(made.refusal.exit_code if made.refusal else ExitCode.OK)


def _fit(made: Plan, given: argparse.Namespace) -> int:
    peak = RTX_4090_FLOPS if given.peak_tflops is None else given.peak_tflops * 1e12
    step_s = made.flops_per_token * made.tokens_per_step / (peak * (given.mfu or MFU))
    chosen = fitting(made, card=given.fit, host=given.host, step_s=step_s)
    if given.write is not None:
        write_atomically(given.write, commented_yaml(chosen.config, given_only=True).encode())
    if given.json:
        memory = {**asdict(chosen.memory), "total": chosen.memory.total}
        found = {"keys": chosen.keys, "memory": memory, "step_s": step_s, "more_s": chosen.seconds}
        print(json.dumps(found, indent=2))
    else:
        before = next(iter(made.memory.values()))
        print("\n".join(lines_of(chosen, before, step_s=step_s)))
    if made.refusal is not None:
        print(f"warning: a run here would be refused: {made.refusal}", file=sys.stderr)
    return int(ExitCode.OK)


def _bytes(text: str) -> int:
    """A size such as 24GiB; a number alone is in GiB."""
    found = re.fullmatch(r"([0-9.]+) *(GiB|GB|)", text.strip())
    try:
        if found is None:
            raise ValueError(text)
        size = float(found[1]) * (10**9 if found[2] == "GB" else 2**30)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"a size such as 24GiB or 24GB (got {text!r})") from error
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"a size above 0 (got {text!r})")
    return int(size)


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
