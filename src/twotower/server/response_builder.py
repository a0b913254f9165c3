"""Builds responses and the events of streams from results. `response_schemas.py` has the schemas.

Only fields that were set are sent: clients distinguish an absent `usage` from null.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import TypedDict

from pydantic import BaseModel

from twotower.decoding.output import BlockEvent, Event, Generation, StepEvent
from twotower.server.choices import Choice
from twotower.server.completion_requests import OpenAIRequest
from twotower.server.reply import ReplyReader
from twotower.server.request_errors import RequestError
from twotower.server.request_schemas import BaseRequest
from twotower.server.response_schemas import (
    CommittedBlock,
    DecodingStats,
    DenoisingStep,
    FinishReason,
    PromptTokensDetails,
    Usage,
)
from twotower.server.service import Service
from twotower.version import VERSION

DONE_EVENT = b"data: [DONE]\n\n"
FINISH_REASONS: dict[str, FinishReason] = {"eos": "stop", "stop": "stop", "length": "length"}


class HeadFields(TypedDict):
    """Fields of every response and chunk."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class TokenFields(TypedDict):
    """Tokens of an event: their start, ids, texts and confidence."""

    index: int
    start: int
    tokens: list[int]
    texts: list[str]
    confidence: list[float]


class EndFields(TypedDict, total=False):
    """Fields of the last chunk of a choice, beside its text."""

    finish_reason: FinishReason | None
    decoding: DecodingStats


class ScoreFields(TypedDict):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ResponseBuilder:
    """Builds the response to one request, as a whole or as the events of a stream. Each API has subclasses."""

    def __init__(self, service: Service, request: BaseRequest, choices: Sequence[Choice]) -> None:
        self.request, self.choices, self.tokenizer = request, choices, service.tokenizer

    def full_response(self, results: Sequence[Generation]) -> bytes:
        """The response with all choices, as JSON."""
        raise NotImplementedError

    def first_events(self) -> Iterable[bytes]:
        """The events of a stream before the first event of the engine."""
        raise NotImplementedError

    def events(self, choice: Choice, event: Event) -> Iterable[bytes]:
        """The events of a stream for an event of the engine; there may be none."""
        raise NotImplementedError

    def last_events(self) -> Iterable[bytes]:
        """The events of a stream after all choices have ended."""
        raise NotImplementedError

    def error_events(self, error: RequestError) -> Iterable[bytes]:
        """The events of an error that ends a stream."""
        raise NotImplementedError

    def _reader(self, choice: Choice) -> ReplyReader:
        """A reader of the reply of a choice."""
        params = choice.engine_request.params
        return ReplyReader(
            choice.reply_format,
            self.tokenizer,
            params.end_tokens,
            choice.strip_leading_space,
            special_tokens_in_text=not params.skip_special_tokens,
        )

    def _denoising(self, choice: Choice, event: StepEvent) -> DenoisingStep:
        """The block after a denoising pass."""
        return DenoisingStep(
            **self._tokens(choice, event),
            step=event.step,
            steps=event.steps,
            masked=event.masked,
        )

    def _tokens(self, choice: Choice, event: Event) -> TokenFields:
        return {
            "index": choice.index,
            "start": event.start,
            "tokens": event.tokens,
            "texts": [self.tokenizer.token_text(token) for token in event.tokens],
            "confidence": [round(confidence, 4) for confidence in event.confidence],
        }

    def _committed(self, choice: Choice, event: BlockEvent) -> dict[str, object]:
        """The tokens of a block, with `stream_denoising`. The text of the chunk may lack an incomplete character."""
        if not self.request.stream_denoising:
            return {}
        committed = CommittedBlock(
            **self._tokens(choice, event),
            committed_at=event.committed_at,
            drafted=list(event.draft),
        )
        return {"committed": committed}

    def _decoding(self, choice: Choice, result: Generation) -> DecodingStats:
        return DecodingStats(
            mode=result.mode,
            seed=choice.seed,
            denoiser_passes=result.denoiser_passes,
            context_passes=result.context_passes,
            tokens_per_pass=round(result.tokens_per_pass, 4),
            drafted=result.drafted,
            accepted=result.accepted,
            seconds=round(result.prefill_seconds + result.decode_seconds, 6),
            **({"mode_reason": result.mode_reason} if result.mode_reason else {}),
        )


class ChunkBuilder(ResponseBuilder):
    """Builds responses of completions and of chat completions, whose streams consist of chunks."""

    request: OpenAIRequest

    prefix: str
    chunk_model: type[BaseModel]
    chunk_object: str  # the field `object` of a chunk

    def __init__(self, service: Service, request: OpenAIRequest, choices: Sequence[Choice]) -> None:
        super().__init__(service, request, choices)
        self.head: HeadFields = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.settings.name,
            "system_fingerprint": f"twotower-{VERSION}",
        }
        self._results: dict[int, Generation] = {}
        self._begun: set[int] = set()  # choices with a chunk
        self._written: dict[int, int] = {}  # new tokens of each choice

    def first_events(self) -> Iterable[bytes]:
        return ()  # the first chunk comes with the first text, so that clients measure the time to it

    def events(self, choice: Choice, event: Event) -> Iterator[bytes]:
        if (chunk := self.event_chunk(choice, event)) is not None:
            yield sse_event(chunk)

    def last_events(self) -> Iterator[bytes]:
        if (chunk := self.usage_chunk()) is not None:
            yield sse_event(chunk)
        yield DONE_EVENT

    def error_events(self, error: RequestError) -> Iterator[bytes]:
        yield sse_event(json.dumps(error.body()).encode())
        yield DONE_EVENT

    def _returned(self, results: Sequence[Generation]) -> list[tuple[int, Choice, Generation]]:
        """The texts of the response, each with its index. With `best_of`, the best n of each prompt, best first."""
        each, returned = self.request.choice_count, self.request.returned_count
        found: list[tuple[Choice, Generation]] = []
        for start in range(0, len(results), each):
            texts = list(zip(self.choices[start : start + each], results[start : start + each], strict=True))
            if each > returned:
                texts.sort(key=lambda text: -text[1].mean_logprob)
            found += texts[:returned]
        return [(index, *text) for index, text in enumerate(found)]

    def event_chunk(self, choice: Choice, event: Event) -> bytes | None:
        """The chunk of an event; None: the event adds nothing yet."""
        if isinstance(event, StepEvent):
            return self.denoising_chunk(choice, event)
        self._written[choice.index] = event.start + len(event.tokens)
        chunk = self.block_chunk(choice, event)
        if chunk is not None:
            self._begun.add(choice.index)
        return chunk

    def block_chunk(self, choice: Choice, event: BlockEvent) -> bytes | None:
        """The chunk of a block; None: the block adds nothing yet. `_begun` has the choices with earlier chunks."""
        raise NotImplementedError

    def _chunk(self, **fields: object) -> bytes:
        usage: dict[str, object] = {}
        if self.request.include_usage:
            continuous = self.request.continuous_usage and fields.get("choices")
            usage = {"usage": self._usage_so_far() if continuous else None}
        return to_json(self.chunk_model(**self.head, object=self.chunk_object, **(usage | fields)))

    def denoising_chunk(self, choice: Choice, event: StepEvent) -> bytes:
        """The chunk of a denoising pass: the block after the pass, without text."""
        return self._chunk(choices=[], denoising=self._denoising(choice, event))

    def usage_chunk(self) -> bytes | None:
        """The last chunk, with the usage; None: the request does not ask for usage."""
        if not self.request.include_usage:
            return None
        return self._chunk(choices=[], usage=self._usage([self._results[choice.index] for choice in self.choices]))

    def _usage_so_far(self) -> Usage:
        """The tokens of all choices up to this chunk. Passes are counted at the end."""
        prompts = self.choices[:: self.request.choice_count]
        read = sum(len(choice.engine_request.prompt) for choice in prompts)
        written = sum(self._written.values())
        return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)

    def _end(self, choice: Choice, result: Generation | None) -> EndFields:
        if result is None:
            return {"finish_reason": None}
        self._results[choice.index] = result
        return {"finish_reason": FINISH_REASONS[result.finish_reason], "decoding": self._decoding(choice, result)}

    def _usage(self, results: Sequence[Generation]) -> Usage:
        """The usage of all generated texts. A prompt counts once, for any number of texts."""
        prompts = results[:: self.request.choice_count]
        read, written = sum(result.prompt_tokens for result in prompts), sum(len(result.tokens) for result in results)
        passes = sum(result.passes for result in results)
        return Usage(
            prompt_tokens=read,
            completion_tokens=written,
            total_tokens=read + written,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(result.cached_tokens for result in prompts)),
            passes=passes,
            tokens_per_pass=round(written / passes, 4) if passes else 0.0,
        )


def to_json(model: BaseModel) -> bytes:
    """JSON in ASCII, so that a lone surrogate from a request cannot break the encoding of the response."""
    return json.dumps(model.model_dump(exclude_unset=True), allow_nan=False).encode()


def sse_event(body: bytes, name: str = "") -> bytes:
    """A server-sent event. name: its type, if the API names its events."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + body + b"\n\n"
