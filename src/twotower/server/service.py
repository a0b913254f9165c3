"""The service behind the routes: one model, its engine and its limits. This module is independent of HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from typing import TypeVar

from twotower.decoding.output import Event, Generation
from twotower.engine import AsyncLLM
from twotower.server.choice_events import choice_events
from twotower.server.choices import Choice, ChoiceBuilder
from twotower.server.completion_requests import GenerationRequest
from twotower.server.concurrency import ConcurrencyLimiter
from twotower.server.constraints import build_constraint
from twotower.server.metrics import Metrics
from twotower.server.readiness import Readiness
from twotower.server.request_errors import RequestError
from twotower.server.request_schemas import ChatRequest
from twotower.server.settings import ServerSettings
from twotower.server.tokenizer_adapter import TokenizerAdapter
from twotower.tokenizer import require_tokenizer

Result = TypeVar("Result")


class Service:
    """Serves one model: builds the choices of requests, limits them and runs them."""

    def __init__(self, engine: AsyncLLM, settings: ServerSettings) -> None:
        self.engine = engine
        self.model = engine.llm.model
        self.settings = settings
        self.tokenizer = TokenizerAdapter(require_tokenizer(self.model.tokenizer))
        self.metrics = Metrics(engine, settings.name)
        self.expositions: Callable[[], Awaitable[bytes]] = self._own_exposition  # of all replicas, if there are any
        self.draining = False
        self.started = int(time.time())
        self._builder = ChoiceBuilder(engine, self.tokenizer)
        self._limiter = ConcurrencyLimiter(engine, self.metrics)
        self.readiness = Readiness(engine, (self.tokenizer.encode_prompt("a") or [0])[:1], settings.decoding)
        # Threads, so that long prompts do not block the event loop, and large response formats do not delay prompts.
        self._tokenizing = ThreadPoolExecutor(1, "twotower-texts")
        self._compiling = ThreadPoolExecutor(1, "twotower-formats")

    async def build_choices(self, request: GenerationRequest) -> list[Choice]:
        """Returns the choices of one request.

        Raises:
            RequestError: The request is invalid (400), or names another model (404).
        """
        if request.model is not None:
            self.check_model_name(request.model)
        loop = asyncio.get_running_loop()
        prompts, constraint = None, None
        if request.constrained:  # the constraint depends on the reasoning, which the prompt may begin
            prompts = await loop.run_in_executor(self._tokenizing, self._builder.prompts, request, self.settings)
            constraint = await loop.run_in_executor(
                self._compiling,
                build_constraint,
                self.tokenizer,
                request.text_format,
                prompts.reply_format,
                request.format_field,
            )
        return await loop.run_in_executor(
            self._tokenizing, self._builder.build, request, self.settings, prompts, constraint
        )

    async def count_tokens(self, request: ChatRequest) -> int:
        """The number of tokens of the prompt of a chat.

        Raises:
            RequestError: As `build_choices`.
        """
        if request.model is not None:
            self.check_model_name(request.model)
        loop = asyncio.get_running_loop()
        prompts = await loop.run_in_executor(self._tokenizing, self._builder.prompts, request, self.settings)
        return len(prompts.tokens[0])

    async def run_on_texts(self, work: Callable[..., Result], *arguments: object) -> Result:
        """Runs work on texts in the thread of prompts, so that it does not block the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work, *arguments)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the served model, as `/v1/models` lists them."""
        return (self.settings.name, *self.settings.more_names)

    def check_model_name(self, model: str) -> None:
        """Raises RequestError (404) unless this is the name of the served model, or its hub id."""
        if model not in (*self.names, *self.settings.aliases):
            words = (
                f"there is no model {model!r}; this server serves {self.settings.name!r}, so name that or omit model"
            )
            raise RequestError(words, status=404, param="model", code="model_not_found")

    @contextmanager
    def admit(self, count: int, key: str | None) -> Iterator[None]:
        """Counts `count` choices as active while the context is open.

        Raises:
            RequestError: The server is stopping (503), or see `ConcurrencyLimiter.acquire`.
        """
        if self.draining:
            raise RequestError("the server is stopping; try again in 5 s", status=503, code="stopping", retry_after=5)
        with self._limiter.acquire(count, key, self.settings.limits):
            yield

    def events(self, choices: Sequence[Choice]) -> AsyncGenerator[tuple[Choice, Event] | None, None]:
        """Runs admitted choices. See `choice_events`."""
        return choice_events(self.engine, choices, self.settings.limits.request_seconds, self.metrics)

    async def results(self, choices: Sequence[Choice]) -> list[Generation]:
        """Runs admitted choices and returns their results in order."""
        found: dict[int, Generation] = {}
        async with aclosing(self.events(choices)) as events:
            async for item in events:
                if item is not None and item[1].result is not None:
                    found[item[0].index] = item[1].result
        return [found[choice.index] for choice in choices]

    async def _own_exposition(self) -> bytes:
        return self.metrics.exposition()

    @property
    def active_choices(self) -> int:
        """Number of choices that run or wait."""
        return self._limiter.active

    @property
    def alive(self) -> bool:
        """Whether the engine runs."""
        return self.engine.alive

    def close(self) -> None:
        """Stops the engine and the threads."""
        self.engine.close()
        self._tokenizing.shutdown(wait=False)
        self._compiling.shutdown(wait=False)
