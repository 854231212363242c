"""Many launches of the trainer for the price of one: its front door, in ranks forked after the imports.

As a script this is a server: a JSON request a line (flags, world_size, unprivileged, hurt, folder), a JSON
answer a line (codes and stderr of each rank, seconds). Every launch has processes and a process group of its
own; only the seconds that importing PyTorch takes are shared. ``WarmRanks`` is its client.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

NOBODY = 65534
LIMIT_S = 120.0
"""A launch that has not ended by then is killed, and its exit code is -9."""


@dataclass(frozen=True, kw_only=True)
class Hurt:
    """A signal in mid-run.

    Attributes:
        number: the signal; SIGSTOP is taken back by SIGCONT after ``held_s``.
        ranks: who gets it.
        after: the file whose existence starts the clock.
        delay_s: from there to the signal.
        held_s: how long a stopped rank stays so.
    """

    number: int
    ranks: tuple[int, ...]
    after: str
    delay_s: float = 0.0
    held_s: float = 0.0


@dataclass(frozen=True)
class Ended:
    """How a launch ended.

    Attributes:
        codes: exit code of each rank.
        errors: stderr of each rank.
        seconds: from the fork to the end of the last rank.
        after_s: from the signal, where there was one, to the end of the last rank.
    """

    codes: tuple[int, ...]
    errors: tuple[str, ...]
    seconds: float
    after_s: float | None = None


class WarmRanks:
    """A server in a process of its own, and what it is asked."""

    def __init__(self, folder: Path, *, script: Path) -> None:
        self._folder, self._count = folder, 0
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=Path(__file__).resolve().parents[2],
            text=True,
        )

    def launch(
        self,
        flags: Sequence[str],
        *,
        world_size: int,
        unprivileged: bool = False,
        hurt: Hurt | None = None,
        own: dict[int, dict[str, str]] | None = None,
    ) -> Ended:
        """Train with these flags on ``world_size`` ranks; ``own`` holds flags of single ranks."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir(parents=True)
        request = {
            "flags": [
                [*flags, *chain.from_iterable((own or {}).get(rank, {}).items())]
                for rank in range(world_size)
            ],
            "world_size": world_size,
            "unprivileged": unprivileged,
            "hurt": asdict(hurt) if hurt else None,
            "folder": str(folder),
        }
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        return Ended(**{**answer, "codes": tuple(answer["codes"]), "errors": tuple(answer["errors"])})

    def close(self) -> None:
        """End the server."""
        with suppress(OSError):
            self._server.communicate(timeout=10)


def open_ranks(folder: Path) -> WarmRanks:
    """A server that keeps what ranks said under ``folder``."""
    return WarmRanks(folder, script=Path(serve.__code__.co_filename))


def serve() -> None:
    """Answer requests until there are none."""
    # Imported once, here, before any fork; nothing of it starts a thread. A rank that gave up its privileges
    # may not read the interpreter's folder any more, so the codec of host names has to be there by then too.
    import encodings.idna  # noqa: F401, PLC0415

    import torch  # noqa: F401, PLC0415

    import apr_dist.report  # noqa: PLC0415
    import apr_dist.train  # noqa: PLC0415
    import apr_dist.training.run  # noqa: F401, PLC0415

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(_launch(json.loads(line))), file=answers, flush=True)


def _launch(request: dict[str, Any]) -> dict[str, Any]:
    began, folder = time.perf_counter(), Path(request["folder"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(request["world_size"]):
        pid = os.fork()
        if pid == 0:
            _become(request, rank, port, folder / f"{rank}.err")
        ranks.append(pid)
    struck = _hurt(Hurt(**request["hurt"]), ranks, began + LIMIT_S) if request["hurt"] else None
    codes = [_wait(pid, began + LIMIT_S) for pid in ranks]
    ended = time.perf_counter()
    errors = [(folder / f"{rank}.err").read_text() for rank in range(len(ranks))]
    after_s = None if struck is None else ended - struck
    return {"codes": codes, "errors": errors, "seconds": ended - began, "after_s": after_s}


def _hurt(hurt: Hurt, ranks: Sequence[int], until: float) -> float | None:
    """Send the signal when its time has come; when that was, or None if the run had ended before."""
    while not Path(hurt.after).exists():
        if time.perf_counter() > until or os.waitid(os.P_PID, ranks[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return None
        time.sleep(0.002)
    time.sleep(hurt.delay_s)
    struck = time.perf_counter()
    for rank in hurt.ranks:
        os.kill(ranks[rank], hurt.number)
    if hurt.number == signal.SIGSTOP:
        time.sleep(hurt.held_s)
        for rank in hurt.ranks:
            os.kill(ranks[rank], signal.SIGCONT)
    return struck


def _become(request: dict[str, Any], rank: int, port: int, errors: Path) -> NoReturn:
    """One rank, from here to its end."""
    code = 1
    try:
        several = request["world_size"] > 1
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["world_size"], "MASTER_PORT": port}
        world |= {"LOCAL_WORLD_SIZE": request["world_size"], "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({name: str(value) for name, value in world.items()} if several else {})
        for descriptor, path in ((1, Path(os.devnull)), (2, errors)):
            target = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            os.dup2(target, descriptor)
        if request["unprivileged"] and os.geteuid() == 0:
            os.seteuid(NOBODY)
        from apr_dist.train import main  # noqa: PLC0415  (already imported by the parent)

        code = main(request["flags"][rank])
    finally:
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, until: float) -> int:
    while time.perf_counter() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    serve()
