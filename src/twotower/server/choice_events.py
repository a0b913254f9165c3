"""Runs the choices of one request concurrently in the engine, and yields their events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial

from twotower.decoding.output import BlockEvent, Event
from twotower.engine import AsyncLLM
from twotower.errors import TwoTowerError
from twotower.server.choices import Choice
from twotower.server.metrics import ChoiceTimes, Metrics
from twotower.server.request_errors import RequestError, request_error, result_error

KEEPALIVE_SECONDS = 15.0  # a stream sends a comment after this time without an event

Message = tuple[Choice, Event | Exception] | None  # None: no event for KEEPALIVE_SECONDS


async def choice_events(
    engine: AsyncLLM, choices: Sequence[Choice], seconds: float | None, metrics: Metrics
) -> AsyncGenerator[tuple[Choice, Event] | None, None]:
    """Yields the events of all choices in order of arrival, and None after `KEEPALIVE_SECONDS` without an event.

    Closing the generator aborts the choices. seconds: time limit for all choices together; None: no limit.

    Raises:
        RequestError: The choices took longer than `seconds` (504), the engine failed (503) or the request failed (500).
    """
    loop, started = asyncio.get_running_loop(), time.monotonic()
    queue: asyncio.Queue[Message] = asyncio.Queue()
    # The timeout is posted to the same queue, because a time limit on each wait would cost more than the event.
    deadline = None if seconds is None else loop.call_later(seconds, queue.put_nowait, (choices[0], TimeoutError()))
    aborts: list[Callable[[], None]] = []
    unfinished, first_event = len(choices), True
    times = {choice.index: ChoiceTimes() for choice in choices}
    try:
        for choice in choices:
            aborts.append(engine.subscribe(choice.engine_request, partial(_post, queue, choice)))
        while unfinished:
            message = await _next(queue)
            if message is None:
                yield None
                continue
            choice, event = message
            if isinstance(event, TimeoutError):
                raise event
            if isinstance(event, Exception):
                raise request_error(event)
            if first_event:
                first_event = False
                metrics.first_block_seconds.observe(time.monotonic() - started)
            if isinstance(event, BlockEvent) and event.tokens:
                metrics.observe_tokens(times[choice.index], len(event.tokens))
            if event.result is not None:
                unfinished -= 1
                max_tokens = choice.engine_request.params.max_new_tokens
                metrics.observe_result(event.result, times[choice.index], max_tokens)
                if event.result.error:
                    raise result_error(event.result, choice.constraint_field)
            yield choice, event
    except TimeoutError:
        raise RequestError(
            f"the request took longer than {seconds:g} s; reduce max_tokens or n", status=504, code="timeout"
        ) from None
    except TwoTowerError as error:
        raise request_error(error) from None
    finally:
        if deadline is not None:
            deadline.cancel()
        for abort in aborts:
            abort()


async def _next(queue: asyncio.Queue[Message]) -> Message:
    timer = asyncio.get_running_loop().call_later(KEEPALIVE_SECONDS, queue.put_nowait, None)
    try:
        return await queue.get()
    finally:
        timer.cancel()


def _post(queue: asyncio.Queue[Message], choice: Choice, event: Event | Exception) -> None:
    queue.put_nowait((choice, event))
