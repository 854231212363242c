"""The verb that says where a training step goes; it takes the trainer's own flags."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from apr_dist.config.reading import parse_command_line
from apr_dist.errors import ExitCode, UsageError
from apr_dist.gates.output import check_run_dir
from apr_dist.parallel.launch import read_launch
from apr_dist.runs.display_choice import open_display
from apr_dist.training.proving import Around, prove


def parser() -> argparse.ArgumentParser:
    """The flags of this verb's own; every other is the trainer's."""
    made = argparse.ArgumentParser(
        prog="apr-dist profile",
        description=profile.__doc__,
        epilog="Every other flag is the trainer's. Nothing is saved but the trace and the summary.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--steps", type=int, default=5, help="steps to measure, after two of warm-up")
    return made


def profile(arguments: Sequence[str]) -> int:
    """Take a few training steps and say where they went: phases, operators, a trace to open.

    Example: apr-dist profile --config configs/demo.yaml --init model.apr --run-dir runs/profile
    """
    given, rest = parser().parse_known_args(list(arguments))
    if given.steps < 1:
        raise UsageError(f"--steps is {given.steps}", where="command line", expected="at least 1")
    config, launch = parse_command_line(rest).config.resolved(), read_launch()
    display = open_display(config.progress, rank=launch.rank, synthetic=config.synthetic)
    around = Around(display=display)
    check_run_dir(config.run_dir, overwrite=config.overwrite or launch.rank != 0, needed_bytes=0)
    proven = prove(config, launch, around)
    try:
        if proven.refusal is not None and launch.world_size == 1:
            raise proven.refusal
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # what the profiler says of itself helps nobody
        from apr_dist.training.profiling import profile_run  # noqa: PLC0415  (imports PyTorch)
        from apr_dist.training.session import Session  # noqa: PLC0415

        with Session(config, proven, around) as session:
            found = profile_run(session, steps=given.steps)
    finally:
        display.close()
        proven.close()
    if launch.rank == 0:
        print("\n" + found.page(), end="")
        print(f"written to {config.run_dir}")
    return int(ExitCode.OK)
