"""An engine in its own thread, used from an event loop."""

from __future__ import annotations

import asyncio
import random
import threading
from unittest.mock import patch

import pytest
import torch
from conftest import EVERY_KIND, build_random_model
from test_engine import alone, some_request

from twotower import LLM, AsyncLLM, Request, TwoTowerForCausalLM
from twotower.decoding.params import GenerationParams
from twotower.errors import ArgumentError, TwoTowerError


@pytest.fixture(scope="module")
def model() -> TwoTowerForCausalLM:
    return build_random_model(EVERY_KIND, dtype=torch.float64)


def long_request(mode: str = "ar") -> Request:
    return Request([5, 6, 7], GenerationParams.of(mode=mode, max_new_tokens=100))


def test_many_at_once_are_as_alone(model: TwoTowerForCausalLM) -> None:
    rng = random.Random(1)
    requests = [some_request(rng) for _ in range(20)]

    async def ask() -> list[list[int]]:
        with AsyncLLM(LLM(model, rows=4, length=160)) as engine:
            return [result.tokens for result in await asyncio.gather(*map(engine.generate, requests))]

    assert asyncio.run(ask()) == [alone(model, request).tokens for request in requests]


def test_events_arrive_while_the_text_is_written(model: TwoTowerForCausalLM) -> None:
    async def ask() -> tuple[list[int], list[int]]:
        with AsyncLLM(LLM(model, rows=2, length=160)) as engine:
            tokens = []
            async for event in engine.stream(long_request()):
                tokens += event.tokens
                if len(tokens) == 1:
                    assert event.result is None
            return tokens, list(engine.llm.core.scheduler.free)

    tokens, free = asyncio.run(ask())
    assert tokens == alone(model, long_request()).tokens
    assert len(free) == 2


def test_leaving_a_stream_frees_the_slot(model: TwoTowerForCausalLM) -> None:
    async def ask() -> None:
        with AsyncLLM(LLM(model, rows=1, length=160)) as engine:
            stream = engine.stream(long_request())
            await anext(stream)
            await stream.aclose()
            task = asyncio.create_task(engine.generate(long_request("diffusion")))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await engine.generate(long_request("verified"))).tokens == alone(model, long_request()).tokens
            assert engine.llm.core.scheduler.free == [0]

    asyncio.run(ask())


def test_a_bad_request_raises_and_the_engine_continues(model: TwoTowerForCausalLM) -> None:
    async def ask() -> None:
        with AsyncLLM(LLM(model, rows=1, length=40)) as engine:
            with pytest.raises(ArgumentError, match="longer than the 40 tokens"):
                await engine.generate(long_request())
            await engine.generate(Request([5], GenerationParams.of(mode="ar", max_new_tokens=3)))

    asyncio.run(ask())


def test_a_closed_engine_says_so(model: TwoTowerForCausalLM) -> None:
    async def ask() -> None:
        engine = AsyncLLM(LLM(model, rows=1, length=160))
        task = asyncio.create_task(engine.generate(long_request()))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(engine.close)
        with pytest.raises(TwoTowerError, match="closed"):
            await task
        with pytest.raises(TwoTowerError, match="closed"):
            await engine.generate(long_request())

    asyncio.run(ask())


def test_requests_to_a_failed_engine_raise(model: TwoTowerForCausalLM) -> None:
    """Also requests that arrive while the engine fails, before its thread ends."""

    async def ask() -> None:
        fails, asked = threading.Event(), threading.Event()

        def step(_: LLM, *__: float) -> None:
            fails.set()
            asked.wait(10)
            raise RuntimeError("a kernel died")

        with patch.object(LLM, "step", step), AsyncLLM(LLM(model, rows=1, length=160)) as broken:
            first = asyncio.create_task(broken.generate(long_request()))
            await asyncio.to_thread(fails.wait, 10)
            second = asyncio.create_task(broken.generate(long_request()))
            await asyncio.sleep(0)
            asked.set()
            for task in (first, second, asyncio.create_task(broken.generate(long_request()))):
                with pytest.raises(TwoTowerError, match="a kernel died") as raised:
                    await asyncio.wait_for(task, 10)
                assert isinstance(raised.value.__cause__, RuntimeError)

    asyncio.run(ask())
