"""Reads a run's log for the pictures, and summarizes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from twotower.errors import ArgumentError
from twotower.training.log import LOG_FILE, read_log
from twotower.training.log_schema import StepRecord

Records = Sequence[StepRecord]
SMOOTHED = 50  # a smoothed curve averages over 1/50 of the run


def load(run: Path) -> list[StepRecord]:
    """The records of a run's log, at least one.

    Raises:
        ArgumentError: no log, no record, or a broken line.
    """
    path = run / LOG_FILE
    if not path.is_file():
        raise ArgumentError(f"{path}: no such file; give the directory of a training run")
    try:
        records = read_log(path)
        steps = [int(record["step"]) for record in records]
    except (ValueError, KeyError, TypeError) as error:
        raise ArgumentError(f"{path}: not a training log ({type(error).__name__}: {error})") from None
    if not steps:
        raise ArgumentError(f"{path}: contains no step yet; draw the curves after the first step")
    return records


def summary(records: Records) -> list[str]:
    """Three lines: steps and speed, loss, and the last validation."""
    first, last = records[0], records[-1]
    seconds, tokens = sum(step_seconds(records)), sum(record["tokens"] for record in records)
    sizes = " then ".join(str(size) for _, size in stages(records))
    smooth = smoothed([record["loss"] for record in records])
    shown = last["step"] if "validation" in last else max((r["step"] for r in records if "validation" in r), default=0)
    found = "no validation yet"
    if shown:
        found_last = next(r["validation"] for r in records if r["step"] == shown)
        values = (f"{k.replace('_', ' ')} {v:.4g}" for k, v in found_last.items() if isinstance(v, int | float))
        found = f"validation at step {shown}: " + ", ".join(values)
    return [
        f"steps {first['step']} to {last['step']}, blocks of {sizes}: {with_prefix(tokens)} tokens in "
        f"{readable_time(seconds)}, {with_prefix(tokens / seconds)} tokens/s",
        f"loss {smooth[-1]:.4g} (at first {first['loss']:.4g}), gradient norm {last['grad_norm']:.3g}, "
        f"learning rate {last['lr']:.2g}",
        found,
    ]


def number(found: Mapping[str, object], name: str) -> float:
    """A number of a record; NaN where the record has none of this name."""
    value = found.get(name)
    return float(value) if isinstance(value, int | float) else float("nan")


def numbers(found: Mapping[str, object], name: str) -> dict[str, float]:
    """Named numbers of a record; none where the record has none of this name."""
    value = found.get(name)
    return value if isinstance(value, dict) else {}


def smoothed(values: Sequence[float]) -> NDArray[np.float64]:
    """A running mean over the last 1/50 of the run (exponential, without a start-up bias)."""
    keep = 1 - 1 / max(len(values) / SMOOTHED, 1)
    out, total, weight = np.empty(len(values)), 0.0, 0.0
    for i, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1
        out[i] = total / weight
    return out


def stages(records: Records) -> list[tuple[int, int]]:
    """(first step, block size) of each stretch of steps with one block size."""
    found: list[tuple[int, int]] = []
    for record in records:
        if not found or record["block_size"] != found[-1][1]:
            found.append((record["step"], record["block_size"]))
    return found


def step_seconds(records: Records) -> list[float]:
    """Seconds of each step. The clock restarts when a run is resumed."""
    clock = [0.0, *(record["timing"]["seconds"] for record in records)]
    return [now - before if now > before else now for before, now in pairwise(clock)]


def with_prefix(number: float) -> str:
    for size, sign in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{sign}"
    return f"{number:.3g}"


def readable_time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"
