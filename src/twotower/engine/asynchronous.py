"""`AsyncLLM`: an engine in a thread of its own, for programs that serve many requests from an event loop."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from twotower.engine.engine import LLM
from twotower.engine.request import Request
from twotower.errors import TwoTowerError
from twotower.generation.output import BlockEvent, Generation

Deliver = Callable[[BlockEvent | Exception], None]


class AsyncLLM:
    """Runs an engine's steps while there is work; nobody else may use the engine meanwhile. Close it when done."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._orders: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()  # None: stop
        self._listeners: dict[int, Deliver] = {}
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="twotower-engine", daemon=True)
        self._thread.start()

    async def stream(self, request: Request) -> AsyncIterator[BlockEvent]:
        """Events of a request as they come; leaving the loop early gives the request up.

        Raises:
            ArgumentError: it can never run here; says why.
            TwoTowerError: the engine has failed or is closed.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[BlockEvent | Exception] = asyncio.Queue()

        def deliver(event: BlockEvent | Exception) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        number: list[int] = []

        def add() -> None:
            try:
                number.append(self.llm.add_request(request))
                self._listeners[number[0]] = deliver
            except Exception as error:
                deliver(error)

        def forget() -> None:
            for own in number:
                self._listeners.pop(own, None)
                self.llm.abort(own)

        if not self._thread.is_alive():
            raise self._failure or TwoTowerError("the engine is closed")
        self._orders.put(add)
        try:
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if event.result is not None:
                    return
        finally:
            self._orders.put(forget)

    async def generate(self, request: Request) -> Generation:
        """The whole result of a request."""
        async for event in self.stream(request):
            if event.result is not None:
                return event.result
        raise TwoTowerError("the engine ended without an answer")

    def close(self) -> None:
        """Stops after the step that is running; requests that have not ended hear a TwoTowerError."""
        self._orders.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._obey():
                for event in self.llm.step():
                    deliver = self._listeners.get(event.row)
                    if deliver is not None:
                        deliver(event)
            self._end(TwoTowerError("the engine is closed"))
        except Exception as error:
            self._failure = error
            self._end(error)

    def _obey(self) -> bool:
        """Carries out what was asked for, and waits while there is nothing to do → False: stop."""
        while True:
            try:
                order = self._orders.get(block=not self.llm.has_work)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()

    def _end(self, error: Exception) -> None:
        for deliver in self._listeners.values():
            deliver(error)
        self._listeners.clear()

    def __enter__(self) -> AsyncLLM:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
