"""Many launches of the trainer for the price of one: its entry point, in ranks forked after the imports.

As a script this is a server: a JSON request a line (the runs of each rank, whom to hurt, folder), a JSON
answer a line (codes and stderr of each rank, seconds). Every launch has processes and a process group of its
own; only the seconds that importing PyTorch takes are shared. ``WarmRanks`` is its client.
"""

from __future__ import annotations

import functools
import gc
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
LIMIT_S = 300.0
"""A launch of one run that has not ended by then is killed, and its exit code is -9.

The first under ZeRO in a fresh checkout compiles DeepSpeed's CPU modules; killed at that, it would leave a
lock on which every later one waits.
"""

REPOSITORY = Path(__file__).resolve().parents[2]


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

    def __init__(self, folder: Path, *, script: Path, deepspeed: bool) -> None:
        self._folder, self._count = folder, 0
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        environment["TORCH_EXTENSIONS_DIR"] = str(REPOSITORY / ".build" / "torch_extensions")
        self._server = subprocess.Popen(
            [sys.executable, str(script), *["--deepspeed"] * deepspeed],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=REPOSITORY,
            text=True,
        )

    def launch(
        self,
        flags: Sequence[str],
        *,
        world_size: int,
        unprivileged: bool | Sequence[int] = False,
        hurt: Hurt | None = None,
        own: dict[int, dict[str, str]] | None = None,
    ) -> Ended:
        """Train with these flags on ``world_size`` ranks; ``own`` holds flags of single ranks.

        ``unprivileged`` are the ranks that file permissions apply to, or whether they do to all.
        """
        users = range(world_size) if unprivileged is True else unprivileged or ()
        runs = [
            [[*flags, *chain.from_iterable((own or {}).get(rank, {}).items())]] for rank in range(world_size)
        ]
        return self._ask(
            {"runs": runs, "unprivileged": list(users), "hurt": asdict(hurt) if hurt else None},
            limit_s=LIMIT_S,
        )

    def launch_all(self, runs: Sequence[Sequence[str]], *, world_size: int, limit_s: float) -> Ended:
        """Train with each of these lists of flags in turn, in the same ranks, up to the first that fails."""
        same = [[list(flags) for flags in runs]] * world_size
        return self._ask({"runs": same, "unprivileged": [], "hurt": None}, limit_s=limit_s)

    def _ask(self, request: dict[str, Any], *, limit_s: float) -> Ended:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir(parents=True)
        request |= {"world_size": len(request["runs"]), "folder": str(folder), "limit_s": limit_s}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        return Ended(**{**answer, "codes": tuple(answer["codes"]), "errors": tuple(answer["errors"])})

    def close(self) -> None:
        """End the server."""
        with suppress(OSError):
            self._server.communicate(timeout=10)


def open_ranks(folder: Path, *, deepspeed: bool = False) -> WarmRanks:
    """A server that keeps what ranks said under ``folder``, and has imported DeepSpeed too on request."""
    return WarmRanks(folder, script=Path(serve.__code__.co_filename), deepspeed=deepspeed)


def serve() -> None:
    """Answer requests until there are none."""
    # Imported once, here, before any fork; nothing of it starts a thread. A rank that gave up its privileges
    # may not read the interpreter's folder any more, so the codecs it will need have to be there by then too.
    import encodings.ascii  # noqa: PLC0415
    import encodings.idna  # noqa: F401, PLC0415

    import torch  # noqa: F401, PLC0415

    import apr_dist.report  # noqa: PLC0415
    import apr_dist.train  # noqa: PLC0415
    import apr_dist.training.trainer  # noqa: F401, PLC0415

    if "--deepspeed" in sys.argv:
        _import_deepspeed()
    gc.collect()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(_launch(json.loads(line))), file=answers, flush=True)


def _import_deepspeed() -> None:
    """DeepSpeed as ranks on CPU use it, with what it otherwise imports and asks in each of them."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import cpuinfo  # noqa: PLC0415
    import deepspeed.ops.adam  # noqa: PLC0415
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401, PLC0415

    # Its optimizer asks what processor this is each time one is made, which takes a second; that stays.
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    cpuinfo.get_cpu_info()


def _launch(request: dict[str, Any]) -> dict[str, Any]:
    began, folder = time.perf_counter(), Path(request["folder"])
    until = began + request["limit_s"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(request["world_size"]):
        pid = os.fork()
        if pid == 0:
            _become(request, rank, port, folder / f"{rank}.err")
        ranks.append(pid)
    struck = _hurt(Hurt(**request["hurt"]), ranks, until) if request["hurt"] else None
    codes = [_wait(pid, until) for pid in ranks]
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
        if rank in request["unprivileged"] and os.geteuid() == 0:
            os.seteuid(NOBODY)
        code = _train(request["runs"][rank])
    finally:
        sys.stderr.flush()
        os._exit(code)


def _train(runs: Sequence[Sequence[str]]) -> int:
    """Every run through the entry point, in one process group; the first exit code that is not 0."""
    # Already imported by the parent.
    import torch.distributed as dist  # noqa: PLC0415

    from apr_dist.parallel.runtime import reset_state  # noqa: PLC0415
    from apr_dist.train import main  # noqa: PLC0415

    for number, flags in enumerate(runs, 1):
        gc.freeze()  # a run collects before it trains, and need not walk what was there before it
        code = main(flags)
        if code:
            return code
        if number < len(runs):
            if dist.is_initialized():
                dist.barrier()
            reset_state()
    return 0


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
