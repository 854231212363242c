"""The verb that says where a training step goes; it takes the trainer's own flags."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from apr_dist.config.reading import parse_command_line
from apr_dist.errors import ExitCode, UsageError
from apr_dist.gates.preflight import run_preflight
from apr_dist.runs.display_choice import open_display


def profile(arguments: Sequence[str]) -> int:
    """Take a few training steps and say where they went: phases, operators, a trace to open.

    Example: apr-dist profile --config configs/demo.yaml --init model.apr --run-dir runs/profile
    """
    parser = argparse.ArgumentParser(
        prog="apr-dist profile",
        description=profile.__doc__,
        epilog="Every other flag is the trainer's. Nothing is saved but the trace and the summary.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=int, default=5, help="steps to measure, after two of warm-up")
    given, rest = parser.parse_known_args(list(arguments))
    if given.steps < 1:
        raise UsageError(f"--steps is {given.steps}", where="command line", expected="at least 1")
    config = parse_command_line(rest).config.resolved()
    display = open_display(config.progress, rank=0, synthetic=config.synthetic)
    preflight = run_preflight(config, world_size=1, say=display)
    try:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # what the profiler says of itself helps nobody
        from apr_dist.training.profiling import profile_run  # noqa: PLC0415  (imports PyTorch)

        found = profile_run(config, preflight, steps=given.steps, display=display)
    finally:
        preflight.close()
    print("\n" + found.page(), end="")
    print(f"written to {config.run_dir}")
    return int(ExitCode.OK)
