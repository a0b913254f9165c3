"""The time of a call: whole, on the device alone, and until it returns to the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

WARM_UP = 4  # calls; a runner may capture a graph at the third use of a shape
MOST = 40  # calls
CYCLES = 2_000_000  # of the device a millisecond, at least
LONGEST_SLEEP = 40.0  # milliseconds


def timed(
    call: Callable[[], object],
    device: torch.device,
    seconds: float,
    before: Callable[[], object] = lambda: None,
    warm_up: int = WARM_UP,
) -> dict[str, float]:
    """Milliseconds of a call, medians of at least two calls within about `seconds`. before: called before it, untimed.

    ms: from the call until the device has finished. On CUDA also "device ms", the time of the kernels alone, because
    they are launched behind a kernel that waits; and "host ms", the time until the call returns.
    """
    for _ in range(warm_up):
        before()
        call()
    whole, end = [], time.perf_counter() + seconds / (1 if device.type == "cpu" else 2)
    while len(whole) < 2 or (time.perf_counter() < end and len(whole) < MOST):
        before()
        wait(device)
        started = time.perf_counter()
        call()
        wait(device)
        whole.append(time.perf_counter() - started)
    found = {"ms": statistics.median(whole) * 1e3}
    if device.type == "cuda":
        found |= apart(call, found["ms"], seconds / 2, before)
    return found


def apart(
    call: Callable[[], object], milliseconds: float, seconds: float, before: Callable[[], object]
) -> dict[str, float]:
    """The times of the device and of the host, apart. milliseconds: of a whole call."""
    on_device, on_host, end = [], [], time.perf_counter() + seconds
    sleep = int(CYCLES * min(2 * milliseconds + 0.2, LONGEST_SLEEP))
    while len(on_device) < 2 or (time.perf_counter() < end and len(on_device) < MOST):
        before()
        torch.cuda.synchronize()
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(sleep)
        first.record()
        started = time.perf_counter()
        call()
        on_host.append(time.perf_counter() - started)
        last.record()
        torch.cuda.synchronize()
        on_device.append(first.elapsed_time(last))
    return {"device ms": statistics.median(on_device), "host ms": statistics.median(on_host) * 1e3}


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call as a CUDA graph; on a CPU the call itself."""
    if device.type == "cpu":
        return call
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def wait(device: torch.device) -> None:
    """Waits for the device to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize()
