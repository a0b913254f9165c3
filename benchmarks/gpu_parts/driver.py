"""Runs parts one after the other, each in a process of its own under a time limit, and merges what they measured.

The processes are forked from one that has imported torch and has not used CUDA, which saves the imports of each part.
A part whose process fails, crashes or hangs does not stop the others.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gpu_parts.parallel import start, wait_until
from gpu_parts.record import MEASUREMENTS, DeviceError, Figures, Record, first_line, read
from gpu_parts.table import markdown
from twotower.file_writes import replace_text
from twotower.json_text import to_json

GRACE = 4.0  # seconds after a part's own end in which a measurement that has begun may finish, at least
LOG = "log.txt"


class Part(NamedTuple):
    """A part. seconds: its share of a run of nine minutes. run: called in the process of the part."""

    name: str
    seconds: float
    text: str
    run: Callable[[Any, Record], None]


@dataclass
class Driver:
    """Runs parts within `minutes`. setting: given to each part. out: the folder of the results."""

    parts: Sequence[Part]
    setting: Any
    minutes: float
    out: Path
    states: dict[str, Figures] = field(default_factory=dict)

    def run(self) -> str:
        """Runs all parts; returns the table of all measurements."""
        self.out.mkdir(parents=True, exist_ok=True)
        for name in (MEASUREMENTS, LOG):
            (self.out / name).unlink(missing_ok=True)
        end = time.monotonic() + 60 * self.minutes
        for number, part in enumerate(self.parts):
            left = end - time.monotonic()
            share = left * part.seconds / sum(one.seconds for one in self.parts[number:])
            if left <= 0:
                self.states[part.name] = {"state": "not begun: no time left", "seconds": 0.0, "limit": 0.0}
            else:
                print(f"{part.name} … (at most {share:.0f} s)", file=sys.stderr, flush=True)
                self.states[part.name] = self._run_part(part, share, left)
                print(f"{part.name}: {self.states[part.name]['state']}", file=sys.stderr, flush=True)
            self.merge()
        return markdown(self.results())

    def results(self) -> Figures:
        """All measurements so far, by part."""
        lines = read(self.out / MEASUREMENTS)
        parts = {
            part.name: {"text": part.text} | self.states[part.name] | {
                "measured": [
                    {name: value for name, value in line.items() if name != "part"}
                    for line in lines
                    if line["part"] == part.name
                ]
            }
            for part in self.parts
            if part.name in self.states
        }  # fmt: skip
        return {"benchmark": "gpu", "minutes": self.minutes, "parts": parts}

    def merge(self) -> None:
        """Writes results.json and results.md."""
        results = self.results()
        replace_text(self.out / "results.json", to_json(results) + "\n")
        replace_text(self.out / "results.md", markdown(results) + "\n")

    def _run_part(self, part: Part, share: float, left: float) -> Figures:
        """Runs one part in a new process → its state, seconds and limit. share: seconds. left: of the whole run."""
        started, before = time.monotonic(), _children_seconds()
        record = Record(self.out / MEASUREMENTS, part.name, share)
        child = start(lambda: _run_alone(part, self.setting, record, self.out / LOG))
        limit = min(share + max(GRACE, share / 4), left)
        status = wait_until(child, started + limit)
        with suppress(ProcessLookupError):  # processes that the part left, and the part itself if it hangs
            os.killpg(child, signal.SIGKILL)
        if status is None:
            os.waitpid(child, 0)
        seconds = time.monotonic() - started
        busy = _children_seconds() - before
        return {"state": _state(status, limit), "seconds": seconds, "limit": limit, "CPU seconds": busy}


def _run_alone(part: Part, setting: Any, record: Record, log: Path) -> None:
    """Runs a part in this process, which becomes the leader of a session of its own."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    print(f"--- {part.name}", file=sys.stderr)
    try:
        part.run(setting, record)
    except DeviceError as error:
        record.add("the rest of this part", error=str(error))
        raise
    except BaseException as error:
        record.add("the rest of this part", error=first_line(error), trace=traceback.format_exc(limit=-6))
        raise


def _children_seconds() -> float:
    """CPU seconds of all processes that this one waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _state(status: int | None, limit: float) -> str:
    if status is None:
        return f"cut off after {limit:.0f} s"
    if os.WIFSIGNALED(status):
        return f"died: {signal.Signals(os.WTERMSIG(status)).name}"
    return "done" if os.WEXITSTATUS(status) == 0 else "failed"
