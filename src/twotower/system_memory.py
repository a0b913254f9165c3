"""The memory that this process can still use: of the machine, and of its control groups (a container's limit)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CGROUP_ROOT = Path("/sys/fs/cgroup")
# Of each version of control groups: the files of the limit and of the used bytes, and the field of memory.stat with
# the cached files that the kernel can drop.
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_memory() -> int | None:
    """Bytes of memory available without swapping; None if the system does not report them."""
    found = [free for free in (_machine_memory(), *_group_memory(Path("/proc/self/cgroup"))) if free is not None]
    return min(found, default=None)


def _machine_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _group_memory(listed: Path, root: Path = CGROUP_ROOT) -> Iterator[int]:
    """Free bytes of each control group with a limit that the process belongs to. listed: its /proc/…/cgroup."""
    try:
        lines = listed.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for number, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if number == "0":
            folder, names = root, V2
        elif "memory" in controllers.split(","):
            folder, names = root / "memory", V1
        else:
            continue
        # In a container, the path may be that of the host; the root is then the container's own group.
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            free = _free_of_group(folder / group.relative_to("/"), names)
            if free is not None:
                yield free


def _free_of_group(group: Path, names: tuple[str, str, str]) -> int | None:
    """Free bytes of one control group; None: it has no limit."""
    limit, used, cached = names
    try:
        free = int((group / limit).read_text(encoding="utf-8")) - int((group / used).read_text(encoding="utf-8"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        return max(free + int(statistics.get(cached, 0)), 0)
    except (OSError, ValueError):  # no such group, or the limit is "max"
        return None
