"""From a client's request to the engine's, and back to results: nothing here knows HTTP."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from twotower.decoding.modes import CONSTRAINED
from twotower.decoding.output import Event, Generation
from twotower.decoding.params import GenerationParams
from twotower.decoding.structured import Constraint
from twotower.engine import AsyncLLM, Request
from twotower.errors import ArgumentError, TwoTowerError
from twotower.model_loading import eos_of
from twotower.server.metrics import Metrics
from twotower.server.request_schemas import Asked, ChatAsked, CompletionAsked, RequestError, ResponseFormat
from twotower.server.settings import Settings
from twotower.server.tokenizer_adapter import Texts

if TYPE_CHECKING:
    from collections.abc import Iterator

# What fields of a request are called in `GenerationParams`.
NAMES = {
    "threshold": "confidence_threshold", "policy": "policy", "knob": "knob", "block_size": "block_size",
    "steps": "steps_per_block", "draft_steps": "draft_steps", "acceptance": "acceptance", "top_k": "top_k",
}  # fmt: skip
BEAT = 15.0  # seconds without an event after which a stream says that it is still there
CHOICE_OF_POSITIONS = {"confidence_threshold", "policy", "knob"}


@dataclass(frozen=True)
class Job:
    """A choice to be written. place: its index in the answer; echo: the prompt, where it is given back; trimmed:
    whether white space before its text is left out."""

    place: int
    request: Request
    seed: int
    echo: str = ""
    trimmed: bool = False


class Service:
    """One model, its engine, and what clients may ask of them."""

    def __init__(self, engine: AsyncLLM, settings: Settings) -> None:
        model = engine.llm.model
        self.engine = engine
        self.model = model
        self.settings = settings
        self.texts = Texts(model.tokenizer, model.config.backbone.vocab_size)
        self.metrics = Metrics(engine.llm)
        self.draining = False
        self.started = int(time.time())
        self._open: Counter[str | None] = Counter()  # choices at work or waiting, by API key
        # Long texts must not hold up the event loop, nor large formats other clients' texts.
        self._writer = ThreadPoolExecutor(1, "twotower-texts")
        self._compiler = ThreadPoolExecutor(1, "twotower-formats")
        self._usual = {"eos_token_id": eos_of(model), "mask_token_id": model.config.mask_token}

    # --- what is asked --------------------------------------------------------------------------------------------

    async def jobs(self, asked: CompletionAsked | ChatAsked) -> list[Job]:
        """Everything that one request wants written.

        Raises:
            RequestError: it cannot be done; says why.
        """
        if asked.model is not None:
            self.check_name(asked.model)
        loop = asyncio.get_running_loop()
        constraint = await loop.run_in_executor(self._compiler, self._constraint, asked.response_format)
        return await loop.run_in_executor(self._writer, self._jobs, asked, constraint)

    def check_name(self, model: str) -> None:
        """Raises RequestError (404) where this is not the served model."""
        if model != self.settings.name:
            raise RequestError(
                f"there is no model {model!r}; this server has {self.settings.name!r}",
                status=404, param="model", code="model_not_found",
            )  # fmt: skip

    def _jobs(self, asked: CompletionAsked | ChatAsked, constraint: Constraint | None) -> list[Job]:
        mode = self._mode(asked)
        asked.check(mode)
        texts = asked.prompts if isinstance(asked, CompletionAsked) else [asked.messages]
        if not texts:
            raise RequestError("prompt is an empty list; give at least one", param="prompt")
        count, most = len(texts) * asked.n, self.settings.limits.choices
        if count > most:
            raise RequestError(
                f"{count} choices are asked for; this server writes at most {most} for a request", param="n"
            )
        if isinstance(asked, ChatAsked):
            tokens, ends = self.texts.chat(asked.messages)
            prompts, stops = [tokens], (*asked.stops, *ends)
        else:
            prompts, stops, ends = [self.texts.tokens(prompt) for prompt in asked.prompts], asked.stops, ()
        usual = self.settings.decoding.get("seed") if mode == self.settings.decoding["mode"] else None
        seed = usual if asked.seed is None else asked.seed
        seed = secrets.randbits(48) if seed is None else seed
        jobs: list[Job] = []
        for prompt in prompts:
            values = self._values(asked, mode, stops) | {"max_new_tokens": self._new_tokens(asked, len(prompt))}
            echo = self.texts.text(prompt) if isinstance(asked, CompletionAsked) and asked.echo else ""
            for choice in range(asked.n):
                params = _params(values | {"seed": seed + choice})
                request = Request(
                    prompt, params, constraint=constraint, watched=asked.stream_denoising, **self._scores(asked)
                )
                self._check(request)
                jobs.append(Job(len(jobs), request, seed + choice, echo, trimmed=bool(ends)))
        return jobs

    def _check(self, request: Request) -> None:
        try:
            self.engine.llm.check(request)
        except ArgumentError as error:
            raise _told(error) from None

    def _mode(self, asked: Asked) -> str:
        mode = asked.mode or str(self.settings.decoding["mode"])
        structured = asked.response_format is not None and asked.response_format.type != "text"
        if structured and mode not in CONSTRAINED:
            if asked.mode is None:
                return "verified" if self.model.denoiser is not None else "ar"
            raise RequestError(
                f"response_format: mode {mode} cannot keep to a format; use mode verified or ar",
                param="response_format",
            )
        return mode

    def _values(self, asked: CompletionAsked | ChatAsked, mode: str, stops: Sequence[str]) -> dict[str, Any]:
        """Arguments of `GenerationParams.of` but for the lengths: the server's own, where the request's mode is the
        server's, then the request's."""
        usual = dict(self.settings.decoding) if mode == self.settings.decoding["mode"] else {}
        given = {name: getattr(asked, field) for field, name in NAMES.items() if getattr(asked, field) is not None}
        if given.keys() & CHOICE_OF_POSITIONS:  # one choice, not to be mixed with the server's
            usual = {name: value for name, value in usual.items() if name not in CHOICE_OF_POSITIONS}
        sampling = {"temperature": asked.temperature, "top_p": asked.top_p}
        own = {name: value for name, value in sampling.items() if name in asked.model_fields_set or name not in usual}
        return self._usual | usual | given | own | {"mode": mode, "stop": tuple(stops)}

    def _new_tokens(self, asked: CompletionAsked | ChatAsked, prompt: int) -> int:
        """New tokens after a prompt of so many, at most.

        Raises:
            RequestError: one of them is too long.
        """
        limits, longest = self.settings.limits, self.engine.llm.length
        chat = isinstance(asked, ChatAsked)
        if limits.prompt_tokens is not None and prompt > limits.prompt_tokens:
            raise RequestError(
                f"the prompt has {prompt} tokens; this server takes at most {limits.prompt_tokens}",
                param="messages" if chat else "prompt",
            )
        field, wanted = "max_tokens", asked.max_tokens
        if isinstance(asked, ChatAsked) and asked.max_completion_tokens is not None:
            field, wanted = "max_completion_tokens", asked.max_completion_tokens
        most = longest - prompt if limits.output_tokens is None else min(longest - prompt, limits.output_tokens)
        said = field in asked.model_fields_set
        if not said and most > 0:
            return most if wanted is None else min(wanted, most)
        wanted = wanted or 0
        if not said:
            field = "messages" if chat else "prompt"
        elif limits.output_tokens is not None and wanted > limits.output_tokens:
            raise RequestError(f"{field} is {wanted}; this server writes at most {limits.output_tokens}", param=field)
        if prompt + wanted > longest or not said:
            raise RequestError(
                f"a prompt of {prompt} tokens plus {wanted} new ones is longer than the {longest} tokens that this "
                "server keeps for a text; shorten one of them",
                param=field,
            )
        return wanted

    def _scores(self, asked: CompletionAsked | ChatAsked) -> dict[str, Any]:
        """Which log-probabilities are asked for."""
        if isinstance(asked, ChatAsked):
            return {"logprobs": asked.top_logprobs or 0} if asked.logprobs else {}
        if asked.logprobs is None:
            return {}
        return {"logprobs": asked.logprobs, "prompt_logprobs": asked.echo}

    def _constraint(self, wanted: ResponseFormat | None) -> Constraint | None:
        if wanted is None or wanted.type == "text":
            return None
        schema = None if wanted.json_schema is None else wanted.json_schema.json_schema
        try:
            return Constraint(
                self.model.tokenizer,
                json_schema=schema,
                json_object=wanted.type == "json_object",
                regex=wanted.regex,
                grammar=wanted.grammar,
            )
        except ArgumentError as error:
            raise RequestError(f"response_format: {error}", param="response_format") from None

    # --- running it -----------------------------------------------------------------------------------------------

    @contextmanager
    def admitted(self, count: int, key: str | None) -> Iterator[None]:
        """Holds places for so many choices.

        Raises:
            RequestError: the server stops (503), the queue is full, or the key has too many at once (429).
        """
        limits, rows = self.settings.limits, self.engine.llm.state.rows
        if self.draining:
            raise RequestError("the server is stopping", status=503, code="stopping", retry_after=5)
        if count > rows + limits.queue:
            raise RequestError(f"{count} choices never fit this server's {rows + limits.queue} places", param="n")
        if limits.per_key is not None and count > limits.per_key:
            raise RequestError(f"{count} choices are more than the {limits.per_key} that a key may have", param="n")
        wait = self.metrics.expected_wait(self._open.total(), rows)
        if self._open.total() + count > rows + limits.queue:
            raise RequestError(
                "too many requests wait; try again later", status=429, code="overloaded", retry_after=wait
            )
        if limits.per_key is not None and self._open[key] + count > limits.per_key:
            raise RequestError(
                f"this key has {self._open[key]} choices at work and may have {limits.per_key}; wait for one to end",
                status=429, code="too_many_at_once", retry_after=wait,
            )  # fmt: skip
        self._open[key] += count
        try:
            yield
        finally:
            self._open[key] -= count
            if not self._open[key]:
                del self._open[key]

    async def events(self, jobs: Sequence[Job]) -> AsyncGenerator[tuple[Job, Event] | None, None]:
        """Runs jobs that were admitted side by side → their events as they come, and None whenever there was none for a
        while. Leaving early gives all of them up.

        Raises:
            RequestError: it took too long (504); the engine failed (503), or the request did (500).
        """
        loop, started = asyncio.get_running_loop(), time.monotonic()
        heard: asyncio.Queue[tuple[Job, Event | Exception] | None] = asyncio.Queue()
        limit = self.settings.limits.seconds
        # Clocks speak through the same queue: waiting for each event with a time limit would cost more than the event.
        clocks = [] if limit is None else [loop.call_later(limit, heard.put_nowait, (jobs[0], TimeoutError()))]
        calls: list[Callable[[], None]] = []
        left, begun = len(jobs), False
        try:
            for job in jobs:
                calls.append(self.engine.listen(job.request, partial(_hear, heard, job)))
            while left:
                beat = loop.call_later(BEAT, heard.put_nowait, None)
                news = await heard.get()
                beat.cancel()
                if news is None:
                    yield None
                    continue
                job, event = news
                if isinstance(event, TimeoutError):
                    raise event
                if isinstance(event, Exception):
                    raise _told(event)
                if not begun:
                    begun = True
                    self.metrics.first.observe(time.monotonic() - started)
                if event.result is not None:
                    left -= 1
                    self.metrics.ended(event.result)
                    if event.result.error:
                        raise RequestError(f"the request failed: {event.result.error}", status=500, code="failed")
                yield job, event
        except TimeoutError:
            raise RequestError(
                f"the request took longer than {limit:g} s; ask for less", status=504, code="timeout"
            ) from None
        except TwoTowerError as error:
            raise _told(error) from None
        finally:
            for clock in clocks:
                clock.cancel()
            for give_up in calls:
                give_up()

    async def results(self, jobs: Sequence[Job]) -> list[Generation]:
        """The jobs' results, in order."""
        found: dict[int, Generation] = {}
        async with aclosing(self.events(jobs)) as events:
            async for news in events:
                if news is not None and news[1].result is not None:
                    found[news[0].place] = news[1].result
        return [found[job.place] for job in jobs]

    @property
    def open(self) -> int:
        """Choices at work or waiting."""
        return self._open.total()

    @property
    def alive(self) -> bool:
        """Whether the engine runs."""
        return self.engine.alive

    def close(self) -> None:
        """Stops the engine."""
        self.engine.close()
        self._writer.shutdown(wait=False)
        self._compiler.shutdown(wait=False)


def _hear(heard: asyncio.Queue[tuple[Job, Event | Exception] | None], job: Job, event: Event | Exception) -> None:
    heard.put_nowait((job, event))


def _params(values: dict[str, Any]) -> GenerationParams:
    try:
        return GenerationParams.of(**values)
    except ArgumentError as error:
        raise _told(error) from None


def _told(error: Exception) -> RequestError:
    """An error of the engine, as a client is told it."""
    if isinstance(error, ArgumentError):
        return RequestError(str(error), param=_field(str(error)))
    if isinstance(error, TwoTowerError):
        return RequestError(str(error), status=503, code="engine", retry_after=5)
    return RequestError(f"the request failed: {type(error).__name__}", status=500, code="failed")


def _field(message: str) -> str | None:
    """The field that a message of `GenerationParams` begins with, by its name in a request."""
    ours = {name: field for field, name in NAMES.items()} | {"max_new_tokens": "max_tokens"}
    first = message.split(" ", 1)[0]
    return ours.get(first, first if first in Asked.model_fields else None)
