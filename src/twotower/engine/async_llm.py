"""`AsyncLLM`: an engine in its own thread, for programs that serve many requests from an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence

from twotower.decoding.output import Event, Generation
from twotower.engine.llm import LLM, STREAM_SECONDS
from twotower.engine.sequence import Request
from twotower.engine.stats import EngineStats
from twotower.errors import TwoTowerError
from twotower.model.tower import steady_weights

EventCallback = Callable[[Event | Exception], object]


class _Subscription:
    """A request with a callback in an event loop. number: the request's number in the engine, once it is added."""

    def __init__(self, request: Request, callback: EventCallback) -> None:
        self.request, self.callback = request, callback
        self.loop = asyncio.get_running_loop()
        self.number: int | None = None


class AsyncLLM:
    """Runs an engine in its own thread while there are requests. Close it after use.

    Until then other threads may only read `stats` and call `check`. The engine's thread decodes with
    `model.tokenizer`; a thread that encodes text at the same time needs a copy of that tokenizer.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._stats = llm.stats()
        self._commands: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()  # None: stop
        self._lock = threading.Lock()  # guards _open and _ended: after the end, no subscription is added
        self._open: set[_Subscription] = set()
        self._ended: TwoTowerError | None = None
        self._running: dict[int, _Subscription] = {}  # by number in the engine; only the engine's thread uses it
        self._thread = threading.Thread(target=self._run, name="twotower-engine", daemon=True)
        self._thread.start()

    async def stream(self, request: Request) -> AsyncGenerator[Event, None]:
        """Yields the events of a request. Leaving the loop early cancels the request.

        Raises:
            ArgumentError: the request can never run in this engine.
            TwoTowerError: the engine has failed or is closed.
        """
        events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        cancel = self.subscribe(request, events.put_nowait)
        try:
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if event.result is not None:
                    return
        finally:
            cancel()

    async def generate(self, request: Request) -> Generation:
        """Runs a request to its end and returns its result."""
        async for event in self.stream(request):
            if event.result is not None:
                return event.result
        raise TwoTowerError("the engine ended before the request did; make another AsyncLLM")

    def subscribe(self, request: Request, callback: EventCallback) -> Callable[[], None]:
        """Submits a request → the function that cancels the request; call it in any case.

        `callback` is called in the running event loop with each event, or with the exception that ends the request.

        Raises:
            TwoTowerError: the engine has failed or is closed.
        """
        call = _Subscription(request, callback)
        with self._lock:
            if self._ended is not None:
                raise self._ended
            self._open.add(call)
        self._commands.put(lambda: self._add(call))

        def cancel() -> None:
            with self._lock:
                self._open.discard(call)
            self._commands.put(lambda: self._forget(call))

        return cancel

    def check(self, request: Request) -> None:
        """Raises ArgumentError if a request can never run in this engine. Callable from any thread."""
        self.llm.check(request)

    @property
    def stats(self) -> EngineStats:
        """The engine's last snapshot. Readable from any thread."""
        return self._stats

    @property
    def alive(self) -> bool:
        """Whether the engine accepts requests: it has neither failed nor been closed."""
        return self._ended is None

    @property
    def failure(self) -> str:
        """Why the engine accepts no requests ("": it does)."""
        return "" if self._ended is None else str(self._ended)

    def close(self) -> None:
        """Stops after the current step. Unfinished requests end with a TwoTowerError."""
        self._commands.put(None)
        self._thread.join()

    # --- the engine's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        end = TwoTowerError("the engine is closed")
        try:
            while self._run_commands():
                with steady_weights():
                    self._step()
                    while self.llm.has_work and self._commands.empty():
                        self._step()
        except Exception as error:
            end = TwoTowerError(f"the engine has failed: {error}")
            end.__cause__ = error
        with self._lock:
            self._ended = end
            calls = list(self._open)
        _deliver([(call, end) for call in calls])

    def _step(self) -> None:
        """Runs a step and delivers its events."""
        events = self.llm.step(STREAM_SECONDS)
        self._stats = self.llm.stats()
        _deliver([(self._running[event.row], event) for event in events if event.row in self._running])

    def _run_commands(self) -> bool:
        """Runs the queued commands; waits for one if the engine has no requests. Returns False to stop."""
        while True:
            try:
                command = self._commands.get(block=not self.llm.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            self._stats = self.llm.stats()

    def _add(self, call: _Subscription) -> None:
        try:
            call.number = self.llm.add_request(call.request)
        except Exception as error:
            _deliver([(call, error)])
        else:
            self._running[call.number] = call

    def _forget(self, call: _Subscription) -> None:
        if call.number is not None:
            self._running.pop(call.number, None)
            self.llm.abort(call.number)

    def __enter__(self) -> AsyncLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _deliver(messages: Sequence[tuple[_Subscription, Event | Exception]]) -> None:
    """Delivers the messages of a step, waking each event loop once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Subscription, Event | Exception]]] = {}
    for call, event in messages:
        by_loop.setdefault(call.loop, []).append((call, event))
    for loop, own in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed, so no one waits
            loop.call_soon_threadsafe(_run_callbacks, own)


def _run_callbacks(messages: Sequence[tuple[_Subscription, Event | Exception]]) -> None:
    for call, event in messages:
        try:
            call.callback(event)
        except Exception as error:  # the other messages must still arrive
            context = {"message": "the callback of a request raised", "exception": error}
            call.loop.call_exception_handler(context)
