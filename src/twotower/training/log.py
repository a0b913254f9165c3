"""Output of a run: a JSONL log with one record a step, TensorBoard curves, and a progress line."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from twotower.file_writes import replace_text
from twotower.json_text import to_json
from twotower.training.log_schema import StepRecord, Timing
from twotower.training.old_names import LOG_RECORD, with_present_names

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from torch.utils.tensorboard import SummaryWriter

LOG_FILE = "log.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
PLAIN_SECONDS = 15.0  # without a terminal: seconds between two progress lines, at least


class Log:
    """RUN/log.jsonl: one object a step. Only the field "timing" depends on the clock."""

    def __init__(self, directory: Path, done: int, tensorboard: bool) -> None:
        """done: steps that the checkpoint holds. Later records and an incomplete last line are removed."""
        self.path = directory / LOG_FILE
        if self.path.exists():
            kept = [record for record in read_log(self.path) if record["step"] <= done]
            replace_text(self.path, "".join(to_json(record) + "\n" for record in kept))
        self._out = self.path.open("a", encoding="utf-8")
        self._board: SummaryWriter | None = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(directory / TENSORBOARD_FOLDER), purge_step=done + 1)

    def write(self, record: StepRecord) -> None:
        """Appends the record of one step."""
        self._out.write(to_json(record) + "\n")
        self._out.flush()
        if self._board is not None:
            for name, value in _scalars(record):
                self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._out.close()
        if self._board is not None:
            self._board.close()


def read_log(path: Path) -> list[StepRecord]:
    """The records of a log. A line that was cut short (process killed, disk full) is skipped."""
    records = []
    present = partial(with_present_names, renamed=LOG_RECORD)
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            records.append(json.loads(line, object_hook=present))
    return records


def _scalars(record: Mapping[str, object], prefix: str = "train/") -> list[tuple[str, float]]:
    out: list[tuple[str, float]] = []
    for name, value in record.items():
        if name == "step":
            continue
        if isinstance(value, dict):
            out += _scalars(value, "validation/" if name == "validation" else f"{prefix}{name}/")
        elif isinstance(value, int | float):
            out.append((prefix + name, float(value)))
    return out


class Progress:
    """Loss, tokens per second and time left: a progress bar on a terminal, a line every 15 s elsewhere."""

    def __init__(self, steps: int, done: int, shown: bool) -> None:
        self.steps, self.first, self.shown = steps, done, shown
        self.started = self._printed = time.perf_counter()
        self._tokens = 0
        self._bar: Bar | None = None
        if shown and sys.stderr.isatty():
            from rich import progress as rich_progress
            from rich.console import Console

            self._bar = rich_progress.Progress(
                rich_progress.MofNCompleteColumn(),
                rich_progress.BarColumn(),
                rich_progress.TextColumn("{task.description}"),
                rich_progress.TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=False,
            )
            self._task = self._bar.add_task("", total=steps, completed=done)
            self._bar.start()

    def step(self, step: int, loss: float, tokens: int) -> Timing:
        """Shows the progress after step number `step` (from 1). Returns the timing for the log record."""
        self._tokens += tokens
        now = time.perf_counter()
        elapsed = now - self.started
        speed = self._tokens / elapsed
        text = f"loss {loss:.4f}  {speed:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif self.shown and (now - self._printed >= PLAIN_SECONDS or step == self.steps):
            self._printed = now
            left = (self.steps - step) * elapsed / max(step - self.first, 1)
            print(f"step {step}/{self.steps}  {text}  {left / 60:.1f} min left", file=sys.stderr, flush=True)
        return {"seconds": round(elapsed, 3), "tokens_per_second": round(speed, 1)}

    def print_line(self, line: str) -> None:
        """Prints one line without disturbing the progress bar."""
        if not self.shown:
            return
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
