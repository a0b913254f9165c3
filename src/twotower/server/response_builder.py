"""From results to what clients get, whole or chunk by chunk (`response_schemas.py` has the shapes).

Only fields that were set are sent: an absent `usage` is not the same as a null one.
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
from twotower.server.tokenizer_adapter import TextOffsets
from twotower.version import VERSION

FINISH_REASONS: dict[str, FinishReason] = {"eos": "stop", "stop": "stop", "length": "length"}


class HeadFields(TypedDict):
    """What every answer begins with."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class TokenFields(TypedDict):
    """Where an event's tokens stand, what they are, and how sure the model is of each."""

    index: int
    start: int
    tokens: list[int]
    texts: list[str]
    confidence: list[float]


class EndFields(TypedDict, total=False):
    """What a choice's last chunk has beside its text."""

    finish_reason: FinishReason | None
    decoding: DecodingStats


class ScoreFields(TypedDict):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ResponseBuilder:
    """Builds one request's answer, whole or chunk by chunk; the two endpoints differ in the parts below."""

    prefix: str
    shape: type[BaseModel]  # of a chunk, and what it calls itself
    kind: str

    def __init__(self, service: Service, request: BaseRequest, choices: Sequence[Choice]) -> None:
        self.request, self.choices, self.tokenizer = request, choices, service.tokenizer
        self.head: HeadFields = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.settings.name,
            "system_fingerprint": f"twotower-{VERSION}",
        }
        self._begun: set[int] = set()  # choices of which some text is out
        self._results: dict[int, Generation] = {}

    def full_response(self, results: Sequence[Generation]) -> bytes:
        """All choices, as JSON."""
        raise NotImplementedError

    def first_chunk(self, choice: Choice) -> bytes | None:
        """The first chunk of a choice, where there is something to say before its first block."""
        raise NotImplementedError

    def block_chunk(self, choice: Choice, event: BlockEvent) -> bytes | None:
        """What a block adds; None: nothing yet."""
        raise NotImplementedError

    def _chunk(self, **fields: object) -> bytes:
        empty = {"usage": None} if self.request.include_usage else {}
        return _json(self.shape(**self.head, object=self.kind, **(empty | fields)))

    def denoising_chunk(self, choice: Choice, event: StepEvent) -> bytes:
        """A chunk without text that shows a block being denoised."""
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
            "confidence": [round(believed, 4) for believed in event.confidence],
        }

    def _committed(self, choice: Choice, event: BlockEvent) -> dict[str, object]:
        """For who watches: what the block's tokens are, beside their text, which may still wait for half a letter."""
        if not self.request.stream_denoising:
            return {}
        committed = CommittedBlock(
            **self._tokens(choice, event),
            committed_at=event.committed_at,
            drafted=list(event.draft),
        )
        return {"committed": committed}

    def usage_chunk(self) -> bytes | None:
        """The chunk with the usage, where it was asked for."""
        if not self.request.include_usage:
            return None
        return self._chunk(choices=[], usage=self._usage([self._results[choice.index] for choice in self.choices]))

    def _text(self, choice: Choice, text: str) -> str:
        """A piece of a choice's text, without white space before its first letter where that is left out."""
        if choice.strip_leading_space and choice.index not in self._begun:
            text = text.lstrip()
        if text:
            self._begun.add(choice.index)
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
            **({"why": result.why} if result.why else {}),
        )

    def _usage(self, results: Sequence[Generation]) -> Usage:
        """A prompt counts once, however many choices it has."""
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
    """`POST /v1/completions`."""

    prefix, shape, kind = "cmpl", Completion, "text_completion"
    request: CompletionRequest

    def __init__(self, service: Service, request: CompletionRequest, choices: Sequence[Choice]) -> None:
        super().__init__(service, request, choices)
        self._reading: dict[int, TextOffsets] = {}

    def full_response(self, results: Sequence[Generation]) -> bytes:
        choices = []
        for choice, result in zip(self.choices, results, strict=True):
            logprobs = None
            if self.request.logprobs is not None:
                logprobs = self._scored(choice, (*result.prompt_logprobs, *result.logprobs))
            text = choice.echo + result.text
            choices.append(
                CompletionChoice(index=choice.index, text=text, logprobs=logprobs, **self._end(choice, result))
            )
        return _json(Completion(**self.head, object="text_completion", choices=choices, usage=self._usage(results)))

    def first_chunk(self, choice: Choice) -> bytes | None:
        if not choice.echo or self.request.logprobs is not None:  # the prompt's scores come with the first block
            return None
        part = CompletionChoice(index=choice.index, text=choice.echo, logprobs=None, finish_reason=None)
        return self._chunk(choices=[part])

    def block_chunk(self, choice: Choice, event: BlockEvent) -> bytes | None:
        text, logprobs = event.text, None
        if self.request.logprobs is not None:
            logprobs = self._scored(choice, (*event.prompt_logprobs, *event.logprobs))
            if event.prompt_logprobs:
                text = choice.echo + text
        elif not text and event.result is None and not self.request.stream_denoising:
            return None
        part = CompletionChoice(index=choice.index, text=text, logprobs=logprobs, **self._end(choice, event.result))
        return self._chunk(choices=[part], **self._committed(choice, event))

    def _scored(self, choice: Choice, scores: Iterable[TokenLogprob | None]) -> CompletionLogprobs:
        """A choice's next tokens, its prompt's among them where that is given back."""
        text = self._reading.setdefault(choice.index, TextOffsets(self.tokenizer))
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets = []
        for score in scores:
            token = choice.engine_request.prompt[0] if score is None else score.token
            own = self.tokenizer.token_text(token)
            tokens.append(own)
            offsets.append(text.offset(token))
            values.append(None if score is None else score.logprob)
            if score is None:
                tops.append(None)
            else:
                tops.append(
                    {own: score.logprob} | {self.tokenizer.token_text(token): value for token, value in score.top}
                )
        return CompletionLogprobs(tokens=tokens, token_logprobs=values, top_logprobs=tops, text_offset=offsets)


class ChatResponseBuilder(ResponseBuilder):
    """`POST /v1/chat/completions`."""

    prefix, shape, kind = "chatcmpl", ChatCompletionChunk, "chat.completion.chunk"
    request: ChatCompletionRequest

    def full_response(self, results: Sequence[Generation]) -> bytes:
        choices = []
        for choice, result in zip(self.choices, results, strict=True):
            message = AssistantMessage(role="assistant", content=self._text(choice, result.text), refusal=None)
            logprobs = self._scored(result.logprobs) if self.request.logprobs else None
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
        logprobs = self._scored(event.logprobs) if self.request.logprobs else None
        if not text and logprobs is None and event.result is None and not self.request.stream_denoising:
            return None
        delta = ChoiceDelta(content=text) if text else ChoiceDelta()
        end = self._end(choice, event.result)
        part = ChatCompletionChunkChoice(index=choice.index, delta=delta, logprobs=logprobs, **end)
        return self._chunk(choices=[part], **self._committed(choice, event))

    def _scored(self, scores: Iterable[TokenLogprob | None]) -> ChatLogprobs:
        content = []
        for score in scores:
            assert score is not None
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
    """The one that goes with the request."""
    return (
        ChatResponseBuilder(service, request, choices)
        if isinstance(request, ChatCompletionRequest)
        else CompletionResponseBuilder(service, request, choices)
    )


def model_card(service: Service) -> ModelCard:
    """What `/v1/models` says."""
    modes = ["ar"] if service.model.denoiser is None else ["diffusion", "verified", "ar", "auto", "mock_ar"]
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
    """In ASCII, so that half a surrogate pair in what a client sent cannot break the answer."""
    return json.dumps(model.model_dump(exclude_unset=True)).encode()
