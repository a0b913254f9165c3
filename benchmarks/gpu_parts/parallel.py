"""Processes that are forked from this one, which saves their imports. Fork before this process uses CUDA."""

from __future__ import annotations

import mmap
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

Task = TypeVar("Task")
DONE = 0xFF
POLL = 0.02  # seconds


def start(work: Callable[[], object]) -> int:
    """Calls `work` in a new process, whose status is 0 if it returns → the process's id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(bool(error.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_until(child: int, end: float) -> int | None:
    """The status of a process that ends before `end` (`time.monotonic`); None otherwise."""
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(POLL)
    return None


def in_processes(tasks: Sequence[Task], work: Callable[[Task], object], processes: int) -> list[Task]:
    """Calls work(task) for each task, in several processes; returns the tasks whose process died.

    A process takes the next task when it has finished one, so that the first tasks begin first. Another process takes
    the place of one that dies.
    """
    queue, write = os.pipe()
    os.write(write, b"".join(number.to_bytes(2, "little") for number in range(len(tasks))))
    os.close(write)
    done = mmap.mmap(-1, max(len(tasks), 1))  # shared: 0, the number of the process that has begun it, or `DONE`

    def take(number: int) -> None:
        while place := os.read(queue, 2):
            task = int.from_bytes(place, "little")
            done[task] = number
            work(tasks[task])
            done[task] = DONE

    running = {start(lambda n=number: take(n)): number for number in range(1, min(processes, len(tasks)) + 1)}
    lost = []
    while running:
        pid, status = os.wait()
        number = running.pop(pid)
        if status:
            died = [task for task in range(len(tasks)) if done[task] == number]
            lost += [tasks[task] for task in died]
            for task in died:
                done[task] = DONE
            running[start(lambda n=number: take(n))] = number
    os.close(queue)
    return lost
