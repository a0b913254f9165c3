"""Builds responses and stream chunks from results. `response_schemas.py` has their schemas.

Only fields that were set are sent: clients distinguish an absent `usage` from null.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import TypedDict

from pydantic import BaseModel

from twotower.decoding.output import BlockEvent, Event, Generation, StepEvent, TokenLogprob
from twotower.server.choices import Choice
from twotower.server.request_schemas import BaseRequest, ChatCompletionRequest, CompletionRequest, GenerationRequest
from twotower.server.response_schemas import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionChunkChoice,
    ChatLogprob,
    ChatLogprobs,
    ChoiceDelta,
    CommittedBlock,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    DecodingStats,
    DenoisingStep,
    FinishReason,
    ModelCard,
    PromptTokensDetails,
    TopLogprob,
    Usage,
)
from twotower.server.service import Service
from twotower.server.text_offsets import ContentLogprobs, TextOffsets
from twotower.version import VERSION

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
    """Builds the response to one request, as a whole or in chunks. Each endpoint has a subclass."""

    prefix: str
    chunk_model: type[BaseModel]
    chunk_object: str  # the field `object` of a chunk

    def __init__(self, service: Service, request: BaseRequest, choices: Sequence[Choice]) -> None:
        self.request, self.choices, self.tokenizer = request, choices, service.tokenizer
        self.head: HeadFields = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.settings.name,
            "system_fingerprint": f"twotower-{VERSION}",
        }
        self._started: set[int] = set()  # choices with text that has been sent
        self._results: dict[int, Generation] = {}

    def full_response(self, results: Sequence[Generation]) -> bytes:
        """The response with all choices, as JSON."""
        raise NotImplementedError

    def first_chunk(self, choice: Choice) -> bytes | None:
        """The chunk of a choice before its first block, if the endpoint has one."""
        raise NotImplementedError

    def block_chunk(self, choice: Choice, event: BlockEvent) -> bytes | None:
        """The chunk of a block; None: the block adds nothing yet."""
        raise NotImplementedError

    def _chunk(self, **fields: object) -> bytes:
        empty = {"usage": None} if self.request.include_usage else {}
        return _json(self.chunk_model(**self.head, object=self.chunk_object, **(empty | fields)))

    def denoising_chunk(self, choice: Choice, event: StepEvent) -> bytes:
        """The chunk of a denoising pass: the block after the pass, without text."""
        denoising = DenoisingStep(
            **self._tokens(choice, event),
            step=event.step,
            steps=event.steps,
            masked=event.masked,
        )
        return self._chunk(choices=[], denoising=denoising)

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

    def usage_chunk(self) -> bytes | None:
        """The last chunk, with the usage; None: the request does not ask for usage."""
        if not self.request.include_usage:
            return None
        return self._chunk(choices=[], usage=self._usage([self._results[choice.index] for choice in self.choices]))

    def _text(self, choice: Choice, text: str) -> str:
        """A piece of a choice's text, without the leading white space if the choice omits it."""
        if choice.strip_leading_space and choice.index not in self._started:
            text = text.lstrip()
        if text:
            self._started.add(choice.index)
        return text

    def _end(self, choice: Choice, result: Generation | None) -> EndFields:
        if result is None:
            return {"finish_reason": None}
        self._results[choice.index] = result
        return {"finish_reason": FINISH_REASONS[result.finish_reason], "decoding": self._decoding(choice, result)}

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

    def _usage(self, results: Sequence[Generation]) -> Usage:
        """The usage of all choices. A prompt counts once, for any number of choices."""
        prompts = results[:: self.request.n]
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


class CompletionResponseBuilder(ResponseBuilder):
    """Builds responses of `POST /v1/completions`."""

    prefix, chunk_model, chunk_object = "cmpl", Completion, "text_completion"
    request: CompletionRequest

    def __init__(self, service: Service, request: CompletionRequest, choices: Sequence[Choice]) -> None:
        super().__init__(service, request, choices)
        self._offsets: dict[int, TextOffsets] = {}

    def full_response(self, results: Sequence[Generation]) -> bytes:
        choices = []
        for choice, result in zip(self.choices, results, strict=True):
            logprobs = None
            if self.request.logprobs is not None:
                logprobs = self._logprobs(choice, result.prompt_logprobs, result.logprobs)
            text = choice.echo + result.text
            choices.append(
                CompletionChoice(index=choice.index, text=text, logprobs=logprobs, **self._end(choice, result))
            )
        return _json(Completion(**self.head, object="text_completion", choices=choices, usage=self._usage(results)))

    def first_chunk(self, choice: Choice) -> bytes | None:
        # With logprobs, the prompt and its log-probabilities come with the first block.
        if not choice.echo or self.request.logprobs is not None:
            return None
        part = CompletionChoice(index=choice.index, text=choice.echo, logprobs=None, finish_reason=None)
        return self._chunk(choices=[part])

    def block_chunk(self, choice: Choice, event: BlockEvent) -> bytes | None:
        text, logprobs = event.text, None
        if self.request.logprobs is not None:
            logprobs = self._logprobs(choice, event.prompt_logprobs, event.logprobs)
            if event.prompt_logprobs:
                text = choice.echo + text
        elif not text and event.result is None and not self.request.stream_denoising:
            return None
        part = CompletionChoice(index=choice.index, text=text, logprobs=logprobs, **self._end(choice, event.result))
        return self._chunk(choices=[part], **self._committed(choice, event))

    def _logprobs(
        self, choice: Choice, prompt: Sequence[TokenLogprob | None], new: Sequence[TokenLogprob]
    ) -> CompletionLogprobs:
        """Log-probabilities of the prompt of a choice, with `echo`, and of its next tokens."""
        text_offsets = self._offsets.setdefault(choice.index, TextOffsets(self.tokenizer, choice.echo))
        out = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for place, score in enumerate((*prompt, *new)):
            token = choice.engine_request.prompt[0] if score is None else score.token
            in_prompt = place < len(prompt)
            out.text_offset.append(text_offsets.prompt_offset(token) if in_prompt else text_offsets.span(token)[0])
            own = self.tokenizer.token_text(token)
            out.tokens.append(own)
            out.token_logprobs.append(None if score is None else score.logprob)
            top = () if score is None else ((token, score.logprob), *score.top)
            tops = {self.tokenizer.token_text(one): value for one, value in top}
            out.top_logprobs.append(tops if score is not None else None)
        return out


class ChatResponseBuilder(ResponseBuilder):
    """Builds responses of `POST /v1/chat/completions`."""

    prefix, chunk_model, chunk_object = "chatcmpl", ChatCompletionChunk, "chat.completion.chunk"
    request: ChatCompletionRequest

    def __init__(self, service: Service, request: ChatCompletionRequest, choices: Sequence[Choice]) -> None:
        super().__init__(service, request, choices)
        self._contents: dict[int, ContentLogprobs] = {}

    def full_response(self, results: Sequence[Generation]) -> bytes:
        choices = []
        for choice, result in zip(self.choices, results, strict=True):
            message = AssistantMessage(role="assistant", content=self._text(choice, result.text), refusal=None)
            logprobs = self._logprobs(choice, result.logprobs, result.text, True) if self.request.logprobs else None
            reason, decoding = FINISH_REASONS[result.finish_reason], self._decoding(choice, result)
            choices.append(
                ChatChoice(
                    index=choice.index, message=message, logprobs=logprobs, finish_reason=reason, decoding=decoding
                )
            )
        return _json(ChatCompletion(**self.head, object="chat.completion", choices=choices, usage=self._usage(results)))

    def first_chunk(self, choice: Choice) -> bytes | None:
        delta = ChoiceDelta(role="assistant", content="")
        part = ChatCompletionChunkChoice(index=choice.index, delta=delta, logprobs=None, finish_reason=None)
        return self._chunk(choices=[part])

    def block_chunk(self, choice: Choice, event: BlockEvent) -> bytes | None:
        text = self._text(choice, event.text)
        logprobs = None
        if self.request.logprobs:
            logprobs = self._logprobs(choice, event.logprobs, event.text, event.result is not None)
        if (
            not text
            and not (logprobs and logprobs.content)
            and event.result is None
            and not self.request.stream_denoising
        ):
            return None
        delta = ChoiceDelta(content=text) if text else ChoiceDelta()
        end = self._end(choice, event.result)
        part = ChatCompletionChunkChoice(index=choice.index, delta=delta, logprobs=logprobs, **end)
        return self._chunk(choices=[part], **self._committed(choice, event))

    def _logprobs(self, choice: Choice, scores: Iterable[TokenLogprob], text: str, last: bool) -> ChatLogprobs:
        """Log-probabilities of the tokens of the content that are final. See `ContentLogprobs`."""
        eos = choice.engine_request.params.eos_token_id
        contents = self._contents.setdefault(
            choice.index, ContentLogprobs(self.tokenizer, eos, choice.strip_leading_space)
        )
        content = []
        for score in contents.take(scores, text, last):
            top = [TopLogprob(**self._alternative(token, value)) for token, value in score.top]
            content.append(ChatLogprob(**self._alternative(score.token, score.logprob), top_logprobs=top))
        return ChatLogprobs(content=content)

    def _alternative(self, token: int, logprob: float) -> ScoreFields:
        return {
            "token": self.tokenizer.token_text(token),
            "logprob": logprob,
            "bytes": list(self.tokenizer.token_bytes(token)),
        }


def response_builder_for(service: Service, request: GenerationRequest, choices: Sequence[Choice]) -> ResponseBuilder:
    """The builder for a request."""
    if isinstance(request, ChatCompletionRequest):
        return ChatResponseBuilder(service, request, choices)
    return CompletionResponseBuilder(service, request, choices)


def model_card(service: Service) -> ModelCard:
    """The model card of the served model."""
    modes = ["diffusion", "verified", "ar", "auto", "mock_ar"] if service.model.has_denoiser else ["ar"]
    return ModelCard(
        id=service.settings.name,
        created=service.started,
        owned_by="twotower",
        max_model_len=service.engine.stats.max_seq_len,
        modes=modes,
        default_mode=str(service.settings.decoding["mode"]),
        block_size=service.engine.stats.max_block_size,
        mask_token_id=service.model.config.mask_token,
    )


def _json(model: BaseModel) -> bytes:
    """JSON in ASCII, so that a lone surrogate from a request cannot break the encoding of the response."""
    return json.dumps(model.model_dump(exclude_unset=True), allow_nan=False).encode()
