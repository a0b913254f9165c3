"""Answers that come in pieces, and what happens when nobody waits for them any more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import ExitStack, aclosing
from typing import TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from twotower.decoding.output import StepEvent
from twotower.server.choices import Choice
from twotower.server.request_errors import RequestError
from twotower.server.response_builder import Answer
from twotower.server.service import Service

DONE = b"data: [DONE]\n\n"
Result = TypeVar("Result")


class Gone(Exception):
    """The client left."""


async def until_gone(request: Request, work: Coroutine[object, object, Result]) -> Result:
    """The work's result; the work is given up the moment the client is gone.

    Raises:
        Gone: it is.
    """
    working, left = asyncio.create_task(work), asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({working, left}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Gone
    finally:
        for task in (working, left):
            task.cancel()
        await asyncio.gather(working, left, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events. However it ends, the events' source is closed at once, and `held` after it."""

    def __init__(self, events: AsyncGenerator[bytes, None], held: ExitStack) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.events, self.held = events, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self.events):
                await super().__call__(scope, receive, send)
        finally:
            self.held.close()


async def chunks(service: Service, answer: Answer, choices: Sequence[Choice]) -> AsyncGenerator[bytes, None]:
    """One request's stream: a chunk for each block, and for each pass over one where that was asked for. An error after
    the start is the last event, in the form of an error's body."""
    try:
        for choice in choices:
            if (opening := answer.opening(choice)) is not None:
                yield _data(opening)
        async with aclosing(service.events(choices)) as events:
            async for news in events:
                if news is None:
                    yield b": still at work\n\n"
                    continue
                choice, event = news
                chunk = answer.step(choice, event) if isinstance(event, StepEvent) else answer.chunk(choice, event)
                if chunk is not None:
                    yield _data(chunk)
        if (closing := answer.closing()) is not None:
            yield _data(closing)
    except RequestError as error:
        yield _data(json.dumps(error.body()).encode())
    yield DONE


def _data(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"
