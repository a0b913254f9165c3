"""Streamed responses, and the handling of clients that disconnect."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import ExitStack, aclosing
from typing import TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from twotower.server.choice_events import KEEPALIVE_SECONDS
from twotower.server.choices import Choice
from twotower.server.request_errors import ClientDisconnected, RequestError
from twotower.server.response_builder import ResponseBuilder
from twotower.server.service import Service

Result = TypeVar("Result")


async def run_until_disconnect(raw_request: Request, work: Coroutine[object, object, Result]) -> Result:
    """Runs `work` and returns its result; cancels `work` if the client disconnects.

    Raises:
        ClientDisconnected: The client disconnected first.
    """
    working, disconnect = asyncio.create_task(work), asyncio.create_task(_wait_for_disconnect(raw_request))
    try:
        await asyncio.wait({working, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnected
    finally:
        for task in (working, disconnect):
            task.cancel()
        await asyncio.gather(working, disconnect, return_exceptions=True)


async def _wait_for_disconnect(raw_request: Request) -> None:
    while (await raw_request.receive())["type"] != "http.disconnect":
        pass


class EventStreamResponse(StreamingResponse):
    """Server-sent events. At the end of the response, or of the connection, it closes `events`, then `resources`."""

    def __init__(self, events: AsyncGenerator[bytes, None], resources: ExitStack) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.events, self.resources = events, resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self.events):
                await super().__call__(scope, receive, send)
        finally:
            self.resources.close()


async def event_stream(
    service: Service, builder: ResponseBuilder, choices: Sequence[Choice]
) -> AsyncGenerator[bytes, None]:
    """Yields the server-sent events of one request. An error after the start of the stream ends it."""
    try:
        for part in builder.first_events():
            yield part
        sent = time.monotonic()
        async with aclosing(service.events(choices)) as events:
            async for item in events:
                # A tool call is sent when it is complete, so there may be events without a chunk for a long time.
                if item is None or time.monotonic() - sent > KEEPALIVE_SECONDS:
                    yield b": keep-alive\n\n"
                    sent = time.monotonic()
                if item is None:
                    continue
                for part in builder.events(*item):
                    yield part
                    sent = time.monotonic()
        for part in builder.last_events():
            yield part
    except RequestError as error:
        for part in builder.error_events(error):
            yield part
