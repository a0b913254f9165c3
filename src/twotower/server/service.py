"""One model, its engine, and what clients may ask of them: nothing here knows HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager

from twotower.decoding.output import Event, Generation
from twotower.engine import AsyncLLM
from twotower.server.choice_events import choice_events
from twotower.server.choices import Choice, ChoiceBuilder, build_constraint
from twotower.server.concurrency import ConcurrencyLimiter
from twotower.server.metrics import Metrics
from twotower.server.request_errors import RequestError
from twotower.server.request_schemas import GenerationRequest
from twotower.server.settings import ServerSettings
from twotower.server.tokenizer_adapter import TokenizerAdapter
from twotower.tokenizer import required


class Service:
    """One model, its engine, and what clients may ask of them."""

    def __init__(self, engine: AsyncLLM, settings: ServerSettings) -> None:
        self.engine = engine
        self.model = engine.llm.model
        self.settings = settings
        self.tokenizer = TokenizerAdapter(required(self.model.tokenizer))
        self.metrics = Metrics(engine)
        self.draining = False
        self.started = int(time.time())
        self._builder = ChoiceBuilder(engine, self.tokenizer)
        self._limiter = ConcurrencyLimiter(engine, self.metrics)
        # Long texts must not hold up the event loop, nor large formats other clients' texts.
        self._tokenizing = ThreadPoolExecutor(1, "twotower-texts")
        self._compiling = ThreadPoolExecutor(1, "twotower-formats")

    async def build_choices(self, request: GenerationRequest) -> list[Choice]:
        """Everything that one request wants written.

        Raises:
            RequestError: it cannot be done; says why.
        """
        if request.model is not None:
            self.check_model_name(request.model)
        loop = asyncio.get_running_loop()
        constraint = await loop.run_in_executor(
            self._compiling, build_constraint, self.tokenizer, request.response_format
        )
        return await loop.run_in_executor(self._tokenizing, self._builder.build, request, constraint, self.settings)

    def check_model_name(self, model: str) -> None:
        """Raises RequestError (404) where this is not the served model."""
        if model != self.settings.name:
            words = f"there is no model {model!r}; this server has {self.settings.name!r}"
            raise RequestError(words, status=404, param="model", code="model_not_found")

    @contextmanager
    def admit(self, count: int, key: str | None) -> Iterator[None]:
        """Holds places for so many choices.

        Raises:
            RequestError: the server stops (503), the queue is full, or the key has too many at once (429).
        """
        if self.draining:
            raise RequestError("the server is stopping", status=503, code="stopping", retry_after=5)
        with self._limiter.acquire(count, key, self.settings.limits):
            yield

    def events(self, choices: Sequence[Choice]) -> AsyncGenerator[tuple[Choice, Event] | None, None]:
        """Runs choices that were admitted. See `choice_events`."""
        return choice_events(self.engine, choices, self.settings.limits.request_seconds, self.metrics)

    async def results(self, choices: Sequence[Choice]) -> list[Generation]:
        """The choices' results, in order."""
        found: dict[int, Generation] = {}
        async with aclosing(self.events(choices)) as events:
            async for item in events:
                if item is not None and item[1].result is not None:
                    found[item[0].index] = item[1].result
        return [found[choice.index] for choice in choices]

    @property
    def active_choices(self) -> int:
        """Choices at work or waiting."""
        return self._limiter.active

    @property
    def alive(self) -> bool:
        """Whether the engine runs."""
        return self.engine.alive

    def close(self) -> None:
        """Stops the engine."""
        self.engine.close()
        self._tokenizing.shutdown(wait=False)
        self._compiling.shutdown(wait=False)
