"""Breaks the code behind each falsifier, one way at a time, and shows that its tests turn red.

    python tests/mutate.py [--only ID ...] [--jobs N] [--list]

Each change is made in a temporary copy of the package, never in the checkout. The tests bound to the
falsifier run on it, and with them those of other falsifiers in the same files that need no front
door: the first must fail, the others must not (unless the mutant says that they share the code). The
table of mutants is in ``mutants/``; results are kept for ``apr-dist contracts explain``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

from mutants import MUTANTS, Change

from apr_dist.contracts.binding import SuiteTest
from apr_dist.contracts.repository import Repository, read_repository
from apr_dist.contracts.results import Mutant, record_mutants

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("apr_dist", "tests", "contracts", "configs", "docs", "rust_loader", "pyproject.toml")
LIMIT_S = 300.0
EXTENSION = "_rust_loader.abi3.so"
BUILDING, RECORDING = Lock(), Lock()
SKIPPED = shutil.ignore_patterns("__pycache__", "target", "session", ".mypy_cache", ".ruff_cache")


@dataclass(frozen=True)
class Trial:
    """What the tests said of one change.

    Attributes:
        change: the mutant.
        red: bound tests that failed.
        also_red: tests of other falsifiers that failed, without the ones it may break.
        seconds: how long it took.
    """

    change: Change
    red: tuple[str, ...]
    also_red: tuple[str, ...]
    seconds: float

    @property
    def verdict(self) -> str:
        """KILLED, SURVIVED, or WIDE when tests of other falsifiers failed as well."""
        if not self.red:
            return "SURVIVED"
        return "WIDE" if self.also_red else "KILLED"


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the mutants; 0 when each is killed by its own tests alone and each bound falsifier has one."""
    options = _options(arguments)
    repository = read_repository(ROOT)
    chosen = [change for change in MUTANTS if not options.only or change.falsifier in options.only]
    stale = [change for change in chosen if len(change.edits(ROOT)) != 1]
    for change in stale:
        times, place = len(change.edits(ROOT)), f"{change.scope or 'the whole'} of {change.file}"
        print(f"STALE     {change.falsifier}: {change.old!r} occurs {times} times in {place}")
    unbound = [change for change in chosen if not repository.bound.get(change.falsifier)]
    for change in unbound:
        print(f"UNBOUND   {change.falsifier}: no test carries it")
    uncovered = sorted(set(repository.bound) - {change.falsifier for change in MUTANTS})
    if options.list:
        for change in chosen:
            print(f"{change.falsifier:44} {change.file}: {change.what}")
        return _end([], stale, unbound, uncovered if not options.only else [])
    ready = [change for change in chosen if change not in stale and change not in unbound]
    trials = _try_all(repository, ready, jobs=options.jobs)
    return _end(trials, stale, unbound, uncovered if not options.only else [])


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="ID", help="mutants of these falsifiers only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many at a time")
    parser.add_argument("--list", action="store_true", help="list the mutants and try none")
    return parser.parse_args(arguments)


def _end(trials: Sequence[Trial], stale: list[Change], unbound: list[Change], uncovered: list[str]) -> int:
    bad = [trial for trial in trials if trial.verdict != "KILLED"]
    for name in uncovered:
        print(f"UNCOVERED {name}: no mutant")
    print(
        f"{len(trials)} mutants of {len({t.change.falsifier for t in trials})} falsifiers:"
        f" {len(trials) - len(bad)} killed, {len(bad)} not; {len(stale)} stale, {len(unbound)} without a"
        f" test, {len(uncovered)} bound falsifiers without a mutant"
    )
    return 1 if bad or stale or unbound or uncovered else 0


def _try_all(repository: Repository, changes: Sequence[Change], *, jobs: int) -> list[Trial]:
    copies: SimpleQueue[Path] = SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        first = _copy(Path(folder) / "copy-0")
        _check_whole(repository, changes, first)
        copies.put(first)
        for number in range(1, min(jobs, len(changes))):
            other = Path(folder) / f"copy-{number}"
            copies.put(Path(shutil.copytree(first, other, symlinks=True, ignore=SKIPPED)))

        def attempt(change: Change) -> Trial:
            copy = copies.get()
            try:
                trial = _try(repository, change, copy)
            finally:
                copies.put(copy)
            with RECORDING:
                record_mutants(ROOT, [_recorded(trial)])
            red = ", ".join(node.rsplit("::", 1)[-1] for node in trial.red) or "nothing"
            also = f"; also {', '.join(trial.also_red)}" if trial.also_red else ""
            print(
                f"{trial.verdict:9} {change.falsifier}: {change.what} -> {red}{also} ({trial.seconds:.0f} s)",
                flush=True,
            )
            return trial

        with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
            return list(pool.map(attempt, changes))


def _check_whole(repository: Repository, changes: Sequence[Change], copy: Path) -> None:
    """On the unbroken copy everything is green, or nothing that follows would mean anything.

    What this run leaves in ``tmp/shared`` (a model trained by unbroken code) serves the runs after it; the
    other runs that tests share are made again for each change (`_forget_runs`).
    """
    nodes = {test.node for change in changes for test in _asked(repository, change)}
    red = _run(copy, sorted(nodes), expected=len(nodes))
    if red:
        sys.exit("these tests fail on the unbroken code: " + ", ".join(sorted(red)))


def _try(repository: Repository, change: Change, copy: Path) -> Trial:
    began = time.perf_counter()
    bound = [test.node for test in repository.bound[change.falsifier]]
    path, extension = change.path(copy), copy / "apr_dist" / EXTENSION
    whole, built = path.read_text(encoding="utf-8"), extension.read_bytes()
    (edit,) = change.edits(copy)
    path.write_text(edit.apply(whole), encoding="utf-8")
    _forget_runs(copy)
    try:
        if path.suffix == ".rs":
            _build(copy)
        red = _run(copy, [test.node for test in _asked(repository, change, doors=False)])
        if not red & set(bound):
            red |= _run(copy, [test.node for test in repository.bound[change.falsifier] if test.entry_point])
    finally:
        path.write_text(whole, encoding="utf-8")
        extension.write_bytes(built)
    spared = {node for name in change.also for test in repository.bound.get(name, ()) for node in [test.node]}
    return Trial(
        change,
        red=tuple(node for node in bound if node in red),
        also_red=tuple(sorted(red - set(bound) - spared)),
        seconds=time.perf_counter() - began,
    )


def _forget_runs(copy: Path) -> None:
    """Remove the runs that earlier trials shared: made by other code, they show nothing of this one.

    The inputs in ``shared`` stay; tests start from them and judge none of them.
    """
    for path in (copy / "tmp").glob("*"):
        if path.name not in {"shared", "shared.lock", "session"}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _build(copy: Path) -> None:
    """Compile the copy's Rust crate, unoptimised, and put it where the copy imports it from."""
    target = ROOT / ".build" / "mutants-target"
    manifest = copy / "rust_loader" / "Cargo.toml"
    command = ["cargo", "build", "--quiet", "--features", "python", "--manifest-path", str(manifest)]
    environment = {**os.environ, "PYO3_PYTHON": sys.executable, "CARGO_TARGET_DIR": str(target)}
    with BUILDING:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"a changed Rust crate does not build:\n{done.stderr}")
        built = next(path for kind in ("so", "dylib") for path in (target / "debug").glob(f"*_loader.{kind}"))
        fresh = copy / "apr_dist" / f"{EXTENSION}.new"
        shutil.copy2(built, fresh)
        fresh.replace(copy / "apr_dist" / EXTENSION)


def _asked(repository: Repository, change: Change, *, doors: bool = True) -> list[SuiteTest]:
    """The bound tests, and those of other falsifiers in the same files that need no entry point."""
    bound = repository.bound[change.falsifier]
    files = {test.file for test in bound}
    beside = [
        test for test in repository.tests.values() if test.file in files and test.ids and not test.entry_point
    ]
    return [test for test in {t.node: t for t in [*bound, *beside]}.values() if doors or not test.entry_point]


def _run(copy: Path, nodes: Iterable[str], *, expected: int | None = None) -> set[str]:
    """Run tests in a copy; the node ids of those that failed. No result at all counts as all failed."""
    nodes = list(nodes)
    if not nodes:
        return set()
    report, temporary = copy / "report.xml", copy / "tmp" / "session"
    report.unlink(missing_ok=True)
    temporary.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={temporary}"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    # As a worker of several, a session looks for shared inputs beside its own folder, where they stay.
    environment["PYTEST_XDIST_WORKER"] = "mutants"
    try:
        subprocess.run(
            [*command, f"--junitxml={report}", *nodes],
            cwd=copy,
            env=environment,
            capture_output=True,
            timeout=LIMIT_S * (1 + len(nodes) / 20),
            check=False,
        )
        cases = list(ET.parse(report).getroot().iter("testcase"))
    except (subprocess.TimeoutExpired, OSError, ET.ParseError):
        return set(nodes)
    failed = {
        _node(case) for case in cases if case.find("failure") is not None or case.find("error") is not None
    }
    failed = {node for node in failed if node in nodes}  # a file that cannot be imported shows nothing
    seen = {_node(case) for case in cases}
    if expected is not None and len(seen) != expected:
        failed |= set(nodes) - seen
    return failed


def _node(case: ET.Element) -> str:
    """Node id of a report's test case, without its parameters."""
    parts = (case.get("classname") or "").split(".")
    cut = next((index for index, part in enumerate(parts) if part.startswith("test_")), len(parts) - 1)
    name = (case.get("name") or "").split("[", 1)[0]
    return "::".join(["/".join(parts[: cut + 1]) + ".py", *parts[cut + 1 :], name])


def _copy(target: Path) -> Path:
    """The package, its built extension and the suite, where a change harms nobody."""
    target.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=SKIPPED, symlinks=True)
        elif source.exists():
            shutil.copy2(source, target / name)
    command = [sys.executable, "-c", "import apr_dist; print(apr_dist.__file__)"]
    environment = {**os.environ, "PYTHONPATH": str(target)}
    found = subprocess.run(command, cwd=target, env=environment, capture_output=True, text=True, check=True)
    if not Path(found.stdout.strip()).is_relative_to(target):
        sys.exit(f"the copy is not what Python imports: {found.stdout.strip()}")
    return target


def _recorded(trial: Trial) -> Mutant:
    change = trial.change
    return Mutant(change.falsifier, change.what, change.file, killed=bool(trial.red), red=trial.red)


if __name__ == "__main__":
    sys.exit(main())
