"""How many shards a process may keep open, and where it remembers which ones were verified on this host.

Lives here: what the operating system allows. Which shards are open is decided by the Rust core.
"""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from pathlib import Path

from apr_dist.errors import UsageError

# For everything else: libraries, sockets of other ranks, files of the run, a second loader.
_RESERVED = 384
_FEWEST = 8
_MOST = 1 << 15
"""A map is kept for each, of the 65,530 that Linux allows a process by default."""


def open_limit(shards: int, wanted: int | None, *, in_views: int) -> int:
    """How many of ``shards`` are kept open; raises the process's soft limit as far as that needs.

    Args:
        shards: of the data set.
        wanted: by the user; None: as many as are allowed.
        in_views: shards that batches made ahead may hold beyond that.

    Raises:
        UsageError: not even a few fit.
    """
    target = min(max(1, shards), _MOST if wanted is None else wanted)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = target + in_views + _RESERVED
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with suppress(ValueError, OSError):  # a container may forbid even this
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, raised), hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    free = needed if soft == resource.RLIM_INFINITY else soft - in_views - _RESERVED
    if free < min(target, _FEWEST):
        raise UsageError(
            f"the process may open {soft:,} files, of which batches made ahead may hold {in_views:,}",
            expected=f"at least {in_views + _RESERVED + min(target, _FEWEST):,}",
            remedy="raise the limit (ulimit -n), or make fewer batches ahead with --loader.prefetch-batches",
        )
    return min(target, free)


def verified_marks() -> Path | None:
    """The file in which processes of this user remember what they verified since this host was started.

    None where it cannot be kept private.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apr-dist"
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        facts = root.stat()
    except (OSError, RuntimeError):
        return None
    private = facts.st_uid == os.geteuid() and not facts.st_mode & 0o022
    return root / f"verified-{started}" if private else None
