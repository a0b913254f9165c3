"""A connection, and how long its client may let the server wait."""

from __future__ import annotations

import asyncio
from typing import cast

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 20.0  # seconds in which a request's line and headers have to arrive
WRITE_SECONDS = 60.0  # seconds after which a client that takes nothing of its answer is gone


class TimeoutH11Protocol(H11Protocol):
    """Uvicorn's own timer covers only the time between two requests: without these two, clients that drip headers or do
    not read would hold connections, and places in the queue, for ever."""

    _head: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))  # a connection's transport has both directions
        self._head = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._head = _cancelled(self._head)  # it is here
        elif self._head is None:
            self._head = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        _cancelled(self._stalled)
        self._stalled = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled = _cancelled(self._stalled)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._head, self._stalled = _cancelled(self._head), _cancelled(self._stalled)


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """None, in the timer's place."""
    if timer is not None:
        timer.cancel()
    return None
