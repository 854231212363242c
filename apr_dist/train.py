"""The front door of training: ``accelerate launch apr_dist/train.py --init model.apr ...``.

Parses, asks the gates, runs, prints the verdict, and ends with the documented exit code. PyTorch is
imported only after rank 0's gates have spoken, so that a refusal takes a second.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# Run as a script, Python puts this folder first on the path, where our `data`, `model` or `config`
# would answer for any library of that name. The folder above holds only the package itself.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from apr_dist.config import TrainConfig
from apr_dist.config.reading import Invocation, parse_command_line
from apr_dist.errors import AprDistError, ExitCode, as_known
from apr_dist.gates.preflight import Preflight, run_preflight
from apr_dist.parallel.launch import read_launch
from apr_dist.parallel.watch import Watch
from apr_dist.parallel.whereabouts import HERE, Phase
from apr_dist.runs.display import Display, hear_libraries
from apr_dist.runs.display_choice import open_display
from apr_dist.runs.log import RunLog
from apr_dist.training.signals import SIGNALS, AtOnce, as_error

if TYPE_CHECKING:
    from apr_dist.runs.resume import ResumePoint


def run(invocation: Invocation, watch: Watch) -> ExitCode:
    """Train once as configured, with ``watch`` over this rank.

    Returns:
        The exit code of the verdict.

    Raises:
        AprDistError: whatever stopped the run.
    """
    config = invocation.config.resolved()
    launch = read_launch()
    rank, world_size = launch.rank, launch.world_size
    display = open_display(config.progress, rank=rank, synthetic=config.synthetic)
    if rank == 0:
        display = RunLog(display, prefix="[SYNTHETIC] " if config.synthetic else "")
    with hear_libraries(display):
        return _run(config, display, rank, world_size, watch)


def _run(config: TrainConfig, display: Display, rank: int, world_size: int, watch: Watch) -> ExitCode:
    preflight, point, refusal = _ask_gates(config, rank, world_size, display)
    try:
        if refusal is not None and world_size == 1:
            raise refusal
        HERE.enter(Phase.IMPORTING)
        from apr_dist.report import verdict_lines  # noqa: PLC0415  (imports PyTorch)
        from apr_dist.training.run import execute  # noqa: PLC0415

        verdict = execute(config, preflight, point, refusal, display, watch)
    except BaseException as error:
        if isinstance(display, RunLog):
            display.keep_error(error)
        raise
    finally:
        display.close()
        if preflight is not None:
            preflight.close()
    for line in verdict_lines(verdict, width=display.width):
        display(line)
    return verdict.exit_code


def _ask_gates(
    config: TrainConfig, rank: int, world_size: int, display: Display
) -> tuple[Preflight | None, ResumePoint | None, AprDistError | None]:
    if rank != 0:
        return None, None, None
    HERE.enter(Phase.GATES)
    try:
        point = _resume_point(config, display.warn)
        folder = point.folder / "checkpoint.apr" if point else None
        found = run_preflight(config, world_size=world_size, say=display, resume_from=folder)
        if point is not None:
            from apr_dist.runs.resume import refuse_other_inputs  # noqa: PLC0415

            refuse_other_inputs(point, found.provenance, init_digest=found.given_init_digest)
    except AprDistError as refusal:
        return None, None, refusal
    except Exception as error:  # the other ranks are on their way to a group that must hear of it
        internal = as_known(error)
        internal.__cause__ = error
        return None, None, internal
    for warning in found.warnings:
        display.warn(warning)
    return found, point, None


def _resume_point(config: TrainConfig, say: Callable[[str], None]) -> ResumePoint | None:
    if config.resume == "never":
        return None
    from apr_dist.runs.resume import find_resume_point  # noqa: PLC0415  (imports PyTorch)

    return find_resume_point(config, say)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and turn whatever happened into one paragraph on stderr and an exit code for every rank."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        launch = read_launch()
        launch.check_address()
    except AprDistError as error:  # who it is among which others is not known, so it speaks for itself
        print(f"error: {error}", file=sys.stderr, flush=True)
        return int(error.exit_code)
    rank = launch.rank
    HERE.enter(Phase.STARTING, step=0)
    HERE.spent.clear()
    watch, signals = Watch(rank=rank).start(), AtOnce()
    with signals:
        try:
            return int(run(parse_command_line(arguments), watch))
        except SystemExit:
            raise
        except BaseException as error:  # the front door: no bare traceback leaves it
            signals.disarm()
            if "--debug" in arguments:
                traceback.print_exc()
            return int(_conclude(error, rank, watch))
        finally:
            signals.disarm()
            watch.leave()


def _conclude(error: BaseException, rank: int, watch: Watch) -> ExitCode:
    """Say what happened here, unless this rank only heard of what happened elsewhere."""
    failure = watch.cause_of(error)
    if failure is not None and failure.rank != rank:
        return ExitCode(failure.code)
    if not isinstance(error, AprDistError):
        interrupted = isinstance(error, KeyboardInterrupt)
        error = as_error(signal.SIGINT, f"while {HERE.phase}") if interrupted else as_known(error)
    if not error.told_by_rank_0:
        place = f" on rank {rank}, at step {HERE.step} while {HERE.phase}" if rank else ""
        print(f"error{place}: {error}", file=sys.stderr, flush=True)
        if error.page:
            print(f"cause and cure: {error.page}", file=sys.stderr, flush=True)
        watch.fail(error.exit_code, str(error))
    return error.exit_code


def _leave(code: int) -> None:
    for number in SIGNALS:  # a launcher stops its workers when the first of them has ended
        signal.signal(number, signal.SIG_IGN)
    # Without PyTorch loaded there is no process group to leave.
    if "torch.distributed" in sys.modules:
        from apr_dist.parallel.runtime import shut_down  # noqa: PLC0415

        shut_down(code)
    sys.exit(code)


if __name__ == "__main__":
    _leave(main())
