"""Runs the choices of one request side by side in the engine, and yields their events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial

from twotower.decoding.output import Event
from twotower.engine import AsyncLLM
from twotower.errors import TwoTowerError
from twotower.server.choices import Choice
from twotower.server.metrics import Metrics
from twotower.server.request_errors import RequestError, request_error

KEEPALIVE_SECONDS = 15.0  # seconds without an event after which a stream says that it is still there

Message = tuple[Choice, Event | Exception] | None  # None: nothing has come for KEEPALIVE_SECONDS seconds


async def choice_events(
    engine: AsyncLLM, choices: Sequence[Choice], seconds: float | None, metrics: Metrics
) -> AsyncGenerator[tuple[Choice, Event] | None, None]:
    """The choices' events as they come, and None whenever there was none for a while. Leaving early gives all choices
    up. seconds: how long they may take together (None: no bound).

    Raises:
        RequestError: it took too long (504); the engine failed (503), or the request did (500).
    """
    loop, started = asyncio.get_running_loop(), time.monotonic()
    queue: asyncio.Queue[Message] = asyncio.Queue()
    # Timeouts are posted to the same queue: a time limit on each wait would cost more than the event.
    deadline = None if seconds is None else loop.call_later(seconds, queue.put_nowait, (choices[0], TimeoutError()))
    calls: list[Callable[[], None]] = []
    left, begun = len(choices), False
    try:
        for choice in choices:
            calls.append(engine.listen(choice.engine_request, partial(_post, queue, choice)))
        while left:
            message = await _next(queue)
            if message is None:
                yield None
                continue
            choice, event = message
            if isinstance(event, TimeoutError):
                raise event
            if isinstance(event, Exception):
                raise request_error(event)
            if not begun:
                begun = True
                metrics.first.observe(time.monotonic() - started)
            if event.result is not None:
                left -= 1
                metrics.observe_result(event.result)
                if event.result.error:
                    raise RequestError(f"the request failed: {event.result.error}", status=500, code="failed")
            yield choice, event
    except TimeoutError:
        raise RequestError(
            f"the request took longer than {seconds:g} s; ask for less", status=504, code="timeout"
        ) from None
    except TwoTowerError as error:
        raise request_error(error) from None
    finally:
        if deadline is not None:
            deadline.cancel()
        for give_up in calls:
            give_up()


async def _next(queue: asyncio.Queue[Message]) -> Message:
    beat = asyncio.get_running_loop().call_later(KEEPALIVE_SECONDS, queue.put_nowait, None)
    try:
        return await queue.get()
    finally:
        beat.cancel()


def _post(queue: asyncio.Queue[Message], choice: Choice, event: Event | Exception) -> None:
    queue.put_nowait((choice, event))
