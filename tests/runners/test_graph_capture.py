"""The order of calls of a capture, with a record in the place of torch's CUDA functions. No GPU is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from twotower.runners import graph_capture
from twotower.runners.graph_capture import WARMUP_PASSES, Capturer, MemoryPool, side_stream

DEVICE = torch.device("cuda", 0)


class FakeStream:
    """A stream that notes for which it waits."""

    def __init__(self, calls: list[object], name: str) -> None:
        self.calls, self.name = calls, name

    def wait_stream(self, other: FakeStream) -> None:
        self.calls.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """The calls of a fake `torch.cuda`, in order."""
    seen: list[object] = []

    @contextmanager
    def noted(what: str) -> Iterator[None]:
        seen.append(f"enter {what}")
        yield
        seen.append(f"leave {what}")

    def made(device: torch.device) -> FakeStream:
        seen.append(f"new stream on {device}")
        return FakeStream(seen, "side")

    def handle() -> str:
        seen.append("new pool")
        return "pool"

    fake = SimpleNamespace(
        device=lambda device: noted(str(device)),
        Stream=made,
        current_stream=lambda: FakeStream(seen, "current"),
        stream=lambda stream: noted(f"stream {stream.name}"),
        graph_pool_handle=handle,
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: seen.append("replay")),
        graph=lambda graph, pool, stream, capture_error_mode: noted(f"capture in {pool} on {stream.name}"),
    )
    monkeypatch.setattr(graph_capture.torch, "cuda", fake)
    side_stream.cache_clear()
    yield seen
    side_stream.cache_clear()


def test_a_capture_warms_up_and_records_on_a_side_stream(calls: list[object]) -> None:
    """The side stream begins after the current one, and the current one goes on after it."""
    replay, result = Capturer(DEVICE, MemoryPool())(lambda: calls.append("compute") or 7)
    assert result == 7
    assert calls == [
        "enter cuda:0", "new stream on cuda:0", "side waits for current",
        "enter stream side", *["compute"] * WARMUP_PASSES, "leave stream side", "current waits for side", "new pool",
        "enter capture in pool on side", "compute", "leave capture in pool on side", "leave cuda:0",
    ]  # fmt: skip
    calls.clear()
    replay()
    assert calls == ["replay"]


def test_captures_of_a_device_share_one_stream_and_those_of_a_tower_one_pool(calls: list[object]) -> None:
    """A stream has a cuBLAS workspace of its own, so each capture with a new one would keep up to 32 MiB."""
    pools = MemoryPool(), MemoryPool()
    for pool in (*pools, *pools):
        Capturer(DEVICE, pool)(lambda: None)
    assert calls.count("new stream on cuda:0") == 1
    assert calls.count("new pool") == len(pools)
    Capturer(torch.device("cuda", 1), pools[0])(lambda: None)
    assert calls.count("new stream on cuda:1") == 1
