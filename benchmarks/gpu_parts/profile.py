"""The operations of one pass that take longest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gpu_parts.clock import wait
from gpu_parts.record import Figures

SHOWN = 12  # operations


def profiled(call: Callable[[], object], device: torch.device) -> Figures:
    """Kernels of a call: their number, milliseconds in all, and the longest with their numbers. On a CPU: operations.

    On CUDA an operation and its kernels are separate entries; only the kernels count.
    """
    cuda = device.type == "cuda"
    call()
    wait(device)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as watched:
        call()
        wait(device)

    def own(event: Any) -> float:
        return float(event.self_device_time_total if cuda else event.self_cpu_time_total)

    events = [one for one in watched.key_averages() if not cuda or "CUDA" in str(one.device_type)]
    longest = sorted(events, key=own, reverse=True)[:SHOWN]
    return {
        "kernels": sum(one.count for one in events),
        "busy ms": sum(map(own, events)) / 1e3,
        "longest": {f"{one.count} {one.key[:60]}": round(own(one) / 1e3, 4) for one in longest},
    }
