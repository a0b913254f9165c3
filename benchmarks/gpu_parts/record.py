"""The file of measurements: one line of JSON each, appended when it is made, so that nothing is lost with a process."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from twotower.json_text import to_json

Figures = dict[str, Any]
MEASUREMENTS = "measurements.jsonl"


class DeviceError(Exception):
    """The CUDA device of this process answers every call with an error; only a new process can use it."""


class Record:
    """Appends the measurements of one part. seconds: of the part; later measurements are skipped by name."""

    def __init__(self, path: Path, part: str, seconds: float) -> None:
        self.path, self.part = path, part
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until the part must end."""
        return self._end - time.monotonic()

    def add(self, what: str, **figures: Any) -> None:
        """Appends one line. The write is atomic, so processes of a part may append to the same file."""
        line = to_json({"part": self.part, "what": what} | figures) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def measure(self, what: str, measurement: Callable[[], Figures], least: float = 0.0) -> Figures | None:
        """The figures of a measurement, which are appended; None if it fails or there is no time for it.

        A failure is appended with its reason. least: seconds that must be left.

        Raises:
            DeviceError: the failure is a CUDA error that stays.
        """
        if self.left() < least or self.left() <= 0:
            self.add(what, skipped="no time left")
            return None
        try:
            figures = measurement()
        except torch.OutOfMemoryError as error:
            self.add(what, skipped=f"does not fit: {first_line(error)}")
            torch.cuda.empty_cache()
        except Exception as error:
            self.add(what, error=first_line(error), trace=traceback.format_exc(limit=-6))
            check_device()
        else:
            self.add(what, **figures)
            return figures
        return None


def first_line(error: BaseException) -> str:
    """The type and the first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]


def check_device() -> None:
    """Raises DeviceError if the CUDA device of this process is not usable any more."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except Exception as error:
        raise DeviceError(f"the device is lost to this process: {first_line(error)}") from None


def read(path: Path) -> list[Figures]:
    """All whole lines of a file of measurements; a line that a killed process left unfinished is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
