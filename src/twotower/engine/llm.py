"""`LLM`: runs requests and returns events and results.

Each request has its own mode, policy, block size and sampling. Requests run together: sequences that need the same
tower share its pass, in any modes and at any lengths. In fp32 and float64
the output of a request does not depend on other requests; with `deterministic` requests, in bf16 neither.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

from twotower.cache.prefix_cache import PrefixCache
from twotower.decoding.checks import check_whole
from twotower.decoding.output import Event, Generation
from twotower.decoding.params import DEFAULT_BLOCK_SIZE
from twotower.engine import admission
from twotower.engine.budget import check_engine, memory_for, needs_of, rows_that_fit
from twotower.engine.core import EngineCore
from twotower.engine.engine_options import EngineOptions, check_options
from twotower.engine.sequence import Request
from twotower.engine.stats import EngineStats
from twotower.engine.towers import Towers, model_for
from twotower.errors import ArgumentError, TwoTowerError
from twotower.model.tower import repeated_lengths, steady_weights

# The most time of several passes in one call: of requests that run to their ends, and where events are awaited.
WHOLE_SECONDS, STREAM_SECONDS = 0.02, 0.004


class LLM:
    """Runs requests on a model.

    rows: sequences that run at once. length: the most tokens of a text, prompt included (None: the model's window).
    block_size: positions of the longest block, at most the window. memory: bytes of state for all texts, a fifth of it
    for the prefix cache (None: for `rows` texts of that length, and the prefix cache). A request reserves the most that
    it can need.

    Raises:
        ArgumentError: a size is not a whole number of at least 1; the memory is too small for a text or a block; or the
            states and blocks do not fit the free memory of a device.
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
        window = model.spec.max_position_embeddings
        self.model = model
        self.length = min(length or window, window)
        block_size = min(block_size, max(window, DEFAULT_BLOCK_SIZE))
        options = options or EngineOptions()
        check_options(model, options)
        check_engine(model, rows, self.length, block_size, memory, options.prefix_cache)
        self.core = EngineCore(model, rows, self.length, block_size, memory, options)
        self._unseen: list[Event] = []  # events that the last caller of `step` did not ask for
        self._next_number = 0

    @staticmethod
    def memory_for(model: Towers, rows: int, length: int, block_size: int = 16) -> int:
        """Bytes for `rows` texts of up to `length` tokens at once; twice as many with the towers on two devices."""
        return memory_for(model, rows, length + block_size, block_size)

    @classmethod
    def fitting(
        cls,
        model: Towers,
        requests: Sequence[Request],
        rows: int,
        memory: int | None = None,
        options: EngineOptions | None = None,
    ) -> LLM:
        """Makes an engine that all requests fit, with at most `rows` running at once, within `memory` bytes.

        Fewer rows run at once if their states and blocks do not fit the free memory.

        Raises:
            ArgumentError: the longest request does not fit the memory.
        """
        length = max((len(request.prompt) + request.params.max_new_tokens for request in requests), default=1)
        block = max((request.params.block_size for request in requests), default=1)
        return cls.fitting_length(model, length, block, min(rows, max(len(requests), 1)), memory, options)

    @classmethod
    def fitting_length(
        cls,
        model: Towers,
        length: int,
        block_size: int,
        rows: int,
        memory: int | None = None,
        options: EngineOptions | None = None,
    ) -> LLM:
        """As `fitting`, for requests of at most `length` tokens, prompt included, and blocks of `block_size`."""
        window = max(model.spec.max_position_embeddings, DEFAULT_BLOCK_SIZE)
        block = min(block_size, window)
        if memory is not None and memory < (least := cls.memory_for(model, 1, length, block)):
            raise ArgumentError(
                f"a text of {length} tokens takes {least / 2**20:.1f} MiB of state, more than the "
                f"{memory / 2**20:.1f} MiB allowed; raise memory or request shorter texts",
                param="memory",
            )
        prefix_cache = options is None or options.prefix_cache
        needs = needs_of(model, length + block, block, block, memory, prefix_cache)
        rows = max(rows_that_fit(needs, rows), 1)
        return cls(model, rows=rows, length=length, block_size=block, memory=memory, options=options)

    @property
    def rows(self) -> int:
        """Sequences that can run at once."""
        return self.core.state.rows

    @property
    def denoiser_passes(self) -> int:
        """Denoiser passes so far."""
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
        """Queues a request → its number, from 0, which its events carry as `row`.

        Raises:
            ArgumentError: the request can never run in this engine.
            TwoTowerError: the engine is closed, or cannot continue after an exception.
        """
        if self.core.recovery.lost is not None:
            raise self.core.recovery.lost
        if self.core.closed:
            raise TwoTowerError("this engine is closed; make another LLM")
        self.check(request)
        number = self._next_number
        self._next_number += 1
        self.core.scheduler.waiting.append((number, admission.with_mask_token(self.model, request)))
        return number

    def check(self, request: Request) -> None:
        """Raises ArgumentError if a request can never run in this engine. Callable from any thread."""
        if not isinstance(request, Request):
            raise ArgumentError(f"request is a {type(request).__name__}; give a Request", param="request")
        core = self.core
        check_options(model_for(self.model, request.params), core.options)
        admission.check(self.model, request, self.length, core.blocks.size, core.state.kv_slots.total)

    def abort(self, number: int) -> None:
        """Removes a waiting or running request. It has no further events, and its slot is free at once.

        Unknown numbers are ignored.
        """
        self._unseen = [event for event in self._unseen if event.row != number]
        self.core.release(number)

    @property
    def has_work(self) -> bool:
        """Whether requests or undelivered events are left."""
        return bool(self.core.scheduler.waiting or self.core.scheduler.running or self._unseen)

    def step(self, seconds: float = 0.0) -> list[Event]:
        """Runs at most one pass of each tower for each sequence → the events since the last step.

        seconds: the time in which several passes may run, where nothing but the length of a row or EOS ends them.
        """
        with repeated_lengths(frozenset((1, self.core.blocks.size, *self.core.scheduler.block_sizes))):
            events = self._unseen + self.core.step(seconds)
        self._unseen = []
        return events

    def generate(
        self, requests: Sequence[Request], progress: Callable[[int], object] | None = None
    ) -> list[Generation]:
        """Runs requests to their ends → results in order. An exception aborts all of them.

        progress: called with the number of finished requests.
        """
        numbers: list[int] = []
        try:
            for request in requests:
                numbers.append(self.add_request(request))
            options = self.core.options
            own_code = options.step_callback is None and options.drafter is None  # a caller's code may change the model
            with steady_weights() if own_code else nullcontext():
                results = self._run_to_end(set(numbers), progress)
        except BaseException:
            for number in numbers:
                self.abort(number)
            raise
        return [results[number] for number in numbers]

    def _run_to_end(self, numbers: set[int], progress: Callable[[int], object] | None) -> dict[int, Generation]:
        """The results of these requests, by number."""
        results: dict[int, Generation] = {}
        while len(results) < len(numbers):
            if not self.has_work:
                raise TwoTowerError("a request was aborted before its end")
            for event in self._step_for(numbers, WHOLE_SECONDS):
                if event.result is not None:
                    results[event.row] = event.result
                    if progress is not None:
                        progress(len(results))
        return results

    def stream(self, request: Request) -> Iterator[Event]:
        """Yields the events of one request. Closing the iterator aborts the request, and aborting ends the iterator.

        Other requests run at the same time. Their own `stream`, or the next `step`, returns their events.
        """
        number = self.add_request(request)
        try:
            while self._knows(number):
                yield from self._step_for({number}, STREAM_SECONDS)
        finally:
            self.abort(number)

    def close(self) -> None:
        """Aborts every request and returns the state's memory to the model. A closed engine accepts no requests."""
        self._unseen.clear()
        self.core.close()

    def _knows(self, number: int) -> bool:
        """Whether a request waits, runs or has undelivered events."""
        return self.core.scheduler.has(number) or any(event.row == number for event in self._unseen)

    def _step_for(self, numbers: set[int], seconds: float) -> list[Event]:
        """Runs a step → the new events of these requests. Events of other requests are kept."""
        events = self.step(seconds)
        self._unseen = [event for event in events if event.row not in numbers]
        return [event for event in events if event.row in numbers] if self._unseen else events
