"""Captures a computation as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

WARMUP_PASSES = 2  # passes before a capture, in which libraries initialise
Result = TypeVar("Result")


class MemoryPool:
    """The memory pool that all graphs of a runner share. Graphs keep their results and share intermediate memory.

    Each tower has a runner, and thus a pool, of its own.
    """

    def __init__(self) -> None:
        self._handle: _POOL_HANDLE | None = None

    @property
    def handle(self) -> _POOL_HANDLE:
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle


class Capturer:
    """Captures computations on one device, in the memory pool of a runner."""

    def __init__(self, device: torch.device, pool: MemoryPool) -> None:
        self.device, self.pool = device, pool

    def __call__(self, compute: Callable[[], Result]) -> tuple[Callable[[], object], Result]:
        """Captures compute() → a function that replays it, and the result, whose tensors each replay fills."""
        with torch.cuda.device(self.device):
            aside, now = side_stream(self.device), torch.cuda.current_stream()
            aside.wait_stream(now)
            with torch.cuda.stream(aside):
                for _ in range(WARMUP_PASSES):
                    compute()
            now.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # Other threads may call the device during the capture, for example to read its free memory.
            with torch.cuda.graph(graph, pool=self.pool.handle, stream=aside, capture_error_mode="thread_local"):
                result = compute()
        return graph.replay, result


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures on a device; each stream has a cuBLAS workspace of up to 32 MiB."""
    return torch.cuda.Stream(device)


def graph_bytes_limit(device: torch.device) -> int:
    """Bytes that the graphs of a tower may keep for their inputs and results: a 32nd of the device's memory."""
    if device.type != "cuda":
        return 1 << 30
    return int(torch.cuda.get_device_properties(device).total_memory) // 32


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an allocation on the device failed, at first or while a capture ended because of it."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error is not None
