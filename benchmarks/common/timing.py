"""Timing: all calls take turns in one process, so that other load on the machine affects all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TimedCall:
    """A call that is timed. `before` is called before it, untimed."""

    call: Callable[[], object]
    before: Callable[[], object] = lambda: None


def synchronize(device: torch.device) -> None:
    """Waits for the device to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def interleaved(
    runs: dict[str, TimedCall], device: torch.device, repeats: int, warm_up: int = 3, least: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of every call, repeat by repeat. All calls take turns; the first `warm_up` repeats are not counted.

    least: minimum seconds of one measurement; shorter calls run several times in a row.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    often = dict.fromkeys(runs, 1)
    for repeat in range(repeats + warm_up):
        for name, run in runs.items():
            run.before()
            taken = seconds(lambda run=run, name=name: [run.call() for _ in range(often[name])], device)
            if repeat >= warm_up:
                times[name].append(taken / often[name])
            elif least:
                often[name] = max(1, round(least * often[name] / max(taken, 1e-9)))
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def ratio(of: list[float], to: list[float]) -> float:
    """The median of the ratios within a repeat."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    return sorted(values)[max(math.ceil(share * len(values)), 1) - 1]
