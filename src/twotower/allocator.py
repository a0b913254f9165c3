"""Settings of glibc's malloc, so that it keeps large freed blocks.

By default, malloc maps and unmaps large temporaries each time. On virtual machines the page faults then dominate: a
hybrid training step took 20 times as long. MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ have the same effect if
they are set before the process starts.
"""

from __future__ import annotations

import ctypes
import ctypes.util

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_large_blocks() -> bool:
    """Applies the settings; call it once, early in a program → whether it had an effect (False: not glibc)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
