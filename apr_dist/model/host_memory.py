"""What the C library does with freed memory, for training on the CPU.

A step frees its activations and asks for as many again. By default glibc gives large blocks back to
the kernel at once and gets them again page by page, zeroed: a tenth of a step and more.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Make this process keep what it frees for its next allocation; returns whether that is possible here.

    The process then stays as large as its largest moment, and somewhat larger where sizes vary. Only
    glibc can be told; see mallopt(3).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    wishes = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return mallopt is not None and all(bool(mallopt(option, value)) for option, value in wishes)
