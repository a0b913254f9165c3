"""glibc's malloc, told to keep large blocks.

By default it maps and unmaps big temporaries each time; on virtual machines the page faults then dominate (20×
on a hybrid training step). Same effect as MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ set before the start.
"""

from __future__ import annotations

import ctypes
import ctypes.util

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_large_blocks() -> bool:
    """Call once, early, from a program's entry point → whether it took effect (False: not glibc)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
