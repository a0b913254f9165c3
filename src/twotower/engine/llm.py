"""`LLM`: requests in, events and results out.

Each request has its own mode, policy, block size and sampling. Requests run beside one another: sequences that need the
same tower share its pass, whatever their modes and however long their texts are. The output of a request does not
depend on its neighbours.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence

from twotower.cache.prefix_cache import PrefixCache
from twotower.decoding.output import Event, Generation
from twotower.decoding.params import check_whole
from twotower.engine import admission
from twotower.engine.budget import memory_for
from twotower.engine.core import EngineCore
from twotower.engine.engine_options import EngineOptions
from twotower.engine.sequence import Request
from twotower.engine.stats import EngineStats
from twotower.engine.towers import Towers
from twotower.errors import ArgumentError, TwoTowerError


class LLM:
    """Runs requests on a model.

    rows: sequences that run at once; length: tokens of the longest text with its answer (None: the model's window);
    block_size: the longest block. memory: bytes for what the texts keep, a fifth of it for the prefix cache (None: for
    `rows` texts of that length, and a fifth more). A text takes as much as its request can need.

    Raises:
        ArgumentError: a size is no whole number of at least 1; the memory holds no text at all.
    """

    def __init__(
        self,
        model: Towers,
        *,
        rows: int = 16,
        length: int | None = None,
        block_size: int = 16,
        memory: int | None = None,
        options: EngineOptions | None = None,
    ) -> None:
        check_whole("rows", rows, least=1)
        check_whole("block_size", block_size, least=1)
        if length is not None:
            check_whole("length", length, least=1)
        window = model.backbone.max_position_embeddings
        self.model = model
        self.length = min(length or window, window)
        self.core = EngineCore(model, rows, self.length, block_size, memory, options or EngineOptions())
        self._unseen: list[Event] = []  # of requests that whoever last ran steps did not ask about
        self._next_number = 0

    @staticmethod
    def memory_for(model: Towers, rows: int, length: int, block_size: int = 16) -> int:
        """Bytes in which so many texts of up to `length` tokens fit at once; twice with the towers on two devices."""
        return memory_for(model, rows, length + block_size)

    @classmethod
    def fitting(
        cls,
        model: Towers,
        requests: Sequence[Request],
        rows: int,
        memory: int | None = None,
        options: EngineOptions | None = None,
    ) -> LLM:
        """An engine that all of these requests fit, with at most `rows` running at once, in so much memory.

        Raises:
            ArgumentError: the longest does not fit the memory; says how much it needs.
        """
        length = max((len(request.prompt) + request.params.max_new_tokens for request in requests), default=1)
        block = max((request.params.block_size for request in requests), default=1)
        if memory is not None and memory < (least := cls.memory_for(model, 1, length, block)):
            raise ArgumentError(
                f"a text of {length} tokens takes {least / 2**20:.1f} MiB of state, more than the "
                f"{memory / 2**20:.1f} MiB allowed; allow more or ask for shorter texts",
                param="memory",
            )
        rows = min(rows, max(len(requests), 1))
        return cls(model, rows=rows, length=length, block_size=block, memory=memory, options=options)

    @property
    def rows(self) -> int:
        """Sequences that can run at once."""
        return self.core.state.rows

    @property
    def denoiser_passes(self) -> int:
        """Passes that the denoiser has made so far."""
        return self.core.blocks.passes

    @property
    def prefixes(self) -> PrefixCache:
        """Deprecated: `stats()` has `prompt_tokens` and `reused_tokens`."""
        message = "LLM.prefixes is deprecated; use LLM.stats().prompt_tokens and .reused_tokens"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return self.core.prefixes

    def stats(self) -> EngineStats:
        """A snapshot of the engine's load. Call this only from the thread that runs `step`."""
        return self.core.stats(self.length)

    # --- requests -------------------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> int:
        """Queues it → its number, which its events carry as `row`; numbers count from 0.

        Raises:
            ArgumentError: it can never run here; says why.
            TwoTowerError: the engine is closed.
        """
        if self.core.closed:
            raise TwoTowerError("this engine is closed; make another")
        self.check(request)
        number = self._next_number
        self._next_number += 1
        self.core.scheduler.waiting.append((number, request))
        return number

    def check(self, request: Request) -> None:
        """Raises ArgumentError where a request can never run here; says why. From any thread."""
        if not isinstance(request, Request):
            raise ArgumentError(f"request is a {type(request).__name__}; give a Request", param="request")
        core = self.core
        admission.check(self.model, request, self.length, core.blocks.size, core.state.kv_slots.total)

    def abort(self, number: int) -> None:
        """Forgets a request, waiting or running: no event of it comes any more, and its slot is free at once. Unknown
        numbers are ignored."""
        self._unseen = [event for event in self._unseen if event.row != number]
        self.core.release(number)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self.core.scheduler.waiting or self.core.scheduler.running or self._unseen)

    def step(self) -> list[Event]:
        """One pass of each tower for every sequence that needs it → what became final since the last step."""
        events = self._unseen + self.core.step()
        self._unseen = []
        return events

    def generate(
        self, requests: Sequence[Request], progress: Callable[[int], object] | None = None
    ) -> list[Generation]:
        """Runs all of them → results in their order; progress is told how many have ended. An exception ends all of
        them, and none stays behind."""
        numbers: list[int] = []
        results: dict[int, Generation] = {}
        try:
            for request in requests:
                numbers.append(self.add_request(request))
            wanted = set(numbers)
            while len(results) < len(numbers):
                if not self.has_work:
                    raise TwoTowerError("a request was aborted before it had ended")
                for event in self._step_for(wanted):
                    if event.result is not None:
                        results[event.row] = event.result
                        if progress is not None:
                            progress(len(results))
        except BaseException:
            for number in numbers:
                self.abort(number)
            raise
        return [results[number] for number in numbers]

    def stream(self, request: Request) -> Iterator[Event]:
        """Events of one request. Others that wait or run go on meanwhile; their own `stream`, or the next `step`,
        returns their events. Closing the iterator aborts the request, and aborting the request ends the iterator."""
        number = self.add_request(request)
        try:
            while self._knows(number):
                yield from self._step_for({number})
        finally:
            self.abort(number)

    def close(self) -> None:
        """Aborts every request and lends the state's memory to the model's next call. A closed engine takes no
        request."""
        self._unseen.clear()
        self.core.close()

    def _knows(self, number: int) -> bool:
        """Whether a request waits, runs or has events that nobody has asked for."""
        return self.core.scheduler.has(number) or any(event.row == number for event in self._unseen)

    def _step_for(self, numbers: set[int]) -> list[Event]:
        """A step → the events of these requests since the last; those of others are kept for whoever asks for them."""
        events = self.step()
        self._unseen = [event for event in events if event.row not in numbers]
        return [event for event in events if event.row in numbers] if self._unseen else events
