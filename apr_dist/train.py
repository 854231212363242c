"""The entry point of training: ``accelerate launch apr_dist/train.py --init model.apr ...``.

Parses, asks the gates, runs, prints the verdict, and ends with the documented exit code. PyTorch is
imported only after rank 0's gates have spoken, so that a refusal takes a second.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

# Run as a script, Python puts this folder first on the path, where our `data`, `model` or `config`
# would answer for any library of that name. The folder above holds only the package itself.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from apr_dist.config import TrainConfig
from apr_dist.config.reading import Invocation, parse_command_line
from apr_dist.errors import AprDistError, ExitCode, Interrupted, Terminated, as_known
from apr_dist.parallel.heartbeat import HERE, Phase
from apr_dist.parallel.launch import Launch, read_launch
from apr_dist.parallel.watchdog import Watch
from apr_dist.runs.display import Display, hear_libraries
from apr_dist.runs.display_choice import open_display
from apr_dist.runs.folder import RunFolder
from apr_dist.runs.lock import RunLock
from apr_dist.runs.log import RunLog
from apr_dist.training.signals import SIGNALS, AtOnce, as_error

try:
    from apr_dist.training.proving import Around, prove
except AprDistError as error:  # the compiled loader is missing
    if __name__ != "__main__":
        raise
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(int(error.exit_code))


def run(invocation: Invocation, watch: Watch) -> ExitCode:
    """Train once as configured, with ``watch`` over this rank.

    Returns:
        The exit code of the verdict.

    Raises:
        AprDistError: whatever stopped the run.
    """
    config, launch = invocation.config.resolved(), read_launch()
    display = open_display(config.progress, rank=launch.rank, synthetic=config.synthetic)
    if launch.rank == 0:
        display = RunLog(display, prefix="[SYNTHETIC] " if config.synthetic else "")
    with (
        contextlib.closing(display),
        hear_libraries(display),
        RunLock(RunFolder(config.run_dir), display.warn) as lock,
    ):
        return _run(config, display, launch, Around(display=display, watch=watch, lock=lock))


def _run(config: TrainConfig, display: Display, launch: Launch, around: Around) -> ExitCode:
    proven = prove(config, launch, around)
    try:
        if proven.refusal is not None and launch.world_size == 1:
            raise proven.refusal
        HERE.enter(Phase.IMPORTING)
        from apr_dist.report import verdict_lines  # noqa: PLC0415  (imports PyTorch)
        from apr_dist.training.session import Session  # noqa: PLC0415
        from apr_dist.training.trainer import train  # noqa: PLC0415

        with Session(config, proven, around) as session:
            verdict = train(session)
    except BaseException as error:
        if isinstance(display, RunLog):
            display.keep_error(error)
        raise
    finally:
        display.close()
        proven.close()
    for line in verdict_lines(verdict, width=display.width):
        display(line)
    return verdict.exit_code


def main(arguments: Sequence[str] | None = None, *, prog: str = "train.py") -> int:
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
            return int(run(parse_command_line(arguments, prog=prog), watch))
        except SystemExit:
            raise
        except BaseException as error:  # the entry point: no bare traceback leaves it
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
        # A launcher sends a signal to every rank; rank 0 prints it for all of them.
        if not (rank and watch.connected and isinstance(error, Interrupted | Terminated)):
            _print_error(error, rank)
        watch.fail(error.exit_code, str(error))
    return error.exit_code


def _print_error(error: AprDistError, rank: int) -> None:
    place = f" on rank {rank}, at step {HERE.step} while {HERE.phase}" if rank else ""
    print(f"error{place}: {error}", file=sys.stderr, flush=True)
    if error.page:
        print(f"see: {error.page}", file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """End the process with ``code``, after the process group was left."""
    for number in SIGNALS:  # a launcher stops its workers when the first of them has ended
        signal.signal(number, signal.SIG_IGN)
    # Without PyTorch loaded there is no process group to leave.
    if "torch.distributed" in sys.modules:
        from apr_dist.parallel.runtime import shut_down  # noqa: PLC0415

        shut_down(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
