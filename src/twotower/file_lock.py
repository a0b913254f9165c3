"""An exclusive lock on an output that a later run resumes, so that two processes never write the same output."""

from __future__ import annotations

import errno
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from twotower.errors import ArgumentError

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl

HELD = (errno.EAGAIN, errno.EACCES)  # errors of flock if another process has the lock
EXIT_SECONDS = 5.0  # the kernel frees the memory of a killed process before its locks


@contextmanager
def exclusive_lock(file: Path, output: Path) -> Iterator[None]:
    """Locks `file`, which is made if it does not exist, for the duration of a `with` block.

    The kernel releases the lock at any end of the process. A file system without locks gets a warning on stderr.
    Devices and pipes are not locked. output: what the lock protects, for messages.

    Raises:
        ArgumentError: another process has the lock.
    """
    with file.open("ab") as handle:
        if stat.S_ISREG(file.stat().st_mode):
            _lock(handle.fileno(), output)
        yield


def _acquire(descriptor: int) -> bool:
    assert fcntl is not None
    deadline = time.monotonic() + EXIT_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in HELD:
                raise
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)


def _lock(descriptor: int, output: Path) -> None:
    reason = "this platform has no flock"
    if fcntl is not None:
        try:
            if not _acquire(descriptor):
                raise ArgumentError(
                    f"{output} is being written by another process; wait until it ends, or name another output"
                )
            return
        except OSError as error:
            reason = error.strerror or str(error)
    print(f"Warning: {output} cannot be locked ({reason}); no second process may write it", file=sys.stderr, flush=True)
