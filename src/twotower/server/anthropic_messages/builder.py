"""Builds responses of `/v1/messages`, and the events of their streams."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence

from pydantic import BaseModel

from twotower.decoding.output import Event, Generation, StepEvent
from twotower.server.anthropic_messages.errors import error_body
from twotower.server.anthropic_messages.objects import (
    Content,
    MessageObject,
    MessageUsage,
    StopReason,
    TextContent,
    ThinkingContent,
    ThinkingTokensDetails,
    ToolUseContent,
)
from twotower.server.anthropic_messages.request import MessagesRequest
from twotower.server.choices import Choice
from twotower.server.reply_parts import PartEnd, PartEvent, PartStart, PartText, ReplyPart, ReplyParts
from twotower.server.request_errors import RequestError
from twotower.server.response_builder import ResponseBuilder, sse_event
from twotower.server.service import Service

# Part of a reply → type and field of its deltas.
DELTAS = {
    "text": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}


class MessagesBuilder(ResponseBuilder):
    """Builds the response to one request of `/v1/messages`. request_id: for errors in streams."""

    request: MessagesRequest

    def __init__(self, service: Service, request: MessagesRequest, request_id: str, choices: Sequence[Choice]) -> None:
        super().__init__(service, request, choices)
        (self._choice,) = choices
        self._model, self._request_id = service.settings.name, request_id
        self._context = service.engine.stats.max_seq_len
        self._id = f"msg_{uuid.uuid4().hex}"
        self._reply, self._parts = self._reader(self._choice), ReplyParts()
        self._result: Generation | None = None

    def full_response(self, results: Sequence[Generation]) -> bytes:
        (self._result,) = results
        for _ in self._parts.take(self._reply.take(self._result.tokens, self._result.text, last=True), last=True):
            pass
        message = self._message([_content(part) for part in self._parts.parts])
        return json.dumps(message.model_dump(), allow_nan=False).encode()

    def first_events(self) -> Iterator[bytes]:
        yield _event("message_start", message=self._message([]).model_dump(exclude={"decoding"}))

    def events(self, choice: Choice, event: Event) -> Iterator[bytes]:
        if isinstance(event, StepEvent):
            yield _event("denoising", denoising=self._denoising(choice, event))
            return
        self._result = event.result
        last = event.result is not None
        for part_event in self._parts.take(self._reply.take(event.tokens, event.text, last), last):
            yield from _part_events(part_event)
        if committed := self._committed(choice, event):
            yield _event("committed", **committed)

    def last_events(self) -> Iterator[bytes]:
        message = self._message([])
        delta = {"stop_reason": message.stop_reason, "stop_sequence": message.stop_sequence}
        yield _event("message_delta", delta=delta, usage=message.usage, decoding=message.decoding)
        yield _event("message_stop")

    def error_events(self, error: RequestError) -> Iterator[bytes]:
        yield sse_event(json.dumps(error_body(error, self._request_id)).encode(), "error")

    def _message(self, content: list[Content]) -> MessageObject:
        result = self._result
        return MessageObject(
            id=self._id,
            model=self._model,
            content=content,
            stop_reason=None if result is None else self._stop_reason(result),
            stop_sequence=None if result is None else self._stop_sequence(result),
            usage=self._usage(),
            decoding=None if result is None else self._decoding(self._choice, result),
        )

    def _stop_sequence(self, result: Generation) -> str | None:
        """The stop sequence of the request that ended the text; the plain format of chats has others."""
        return result.stop_string if result.stop_string in self.request.stop_strings else None

    def _stop_reason(self, result: Generation) -> StopReason:
        if result.finish_reason == "length":
            full = result.prompt_tokens + len(result.tokens) >= self._context
            return "model_context_window_exceeded" if full else "max_tokens"
        if self._stop_sequence(result) is not None:
            return "stop_sequence"
        return "tool_use" if any(part.kind == "call" for part in self._parts.parts) else "end_turn"

    def _usage(self) -> MessageUsage:
        result = self._result
        if result is None:  # before the text
            tokens = len(self._choice.engine_request.prompt)
            return MessageUsage(input_tokens=tokens, cache_read_input_tokens=0, output_tokens=0)
        thinking = self._reply.reasoning_tokens(result.tokens)
        return MessageUsage(
            input_tokens=result.prompt_tokens - result.cached_tokens,
            cache_read_input_tokens=result.cached_tokens,
            output_tokens=len(result.tokens),
            output_tokens_details=ThinkingTokensDetails(thinking_tokens=thinking),
            passes=result.passes,
            tokens_per_pass=round(result.tokens_per_pass, 4),
        )


def _part_events(event: PartEvent) -> Iterator[bytes]:
    """The events of what happens to a part, which is a block of the content."""
    part = event.part
    match event:
        case PartStart():
            empty = ReplyPart(part.index, part.kind, "", part.call_id, part.name)
            yield _event("content_block_start", index=part.index, content_block=_content(empty))
        case PartText(_, text):
            kind, field = DELTAS[part.kind]
            yield _event("content_block_delta", index=part.index, delta={"type": kind, field: text})
        case PartEnd():
            if part.kind == "reasoning":
                signature = {"type": "signature_delta", "signature": ""}
                yield _event("content_block_delta", index=part.index, delta=signature)
            yield _event("content_block_stop", index=part.index)


def _content(part: ReplyPart) -> Content:
    """The block of a part."""
    if part.kind == "text":
        return TextContent(text=part.text)
    if part.kind == "reasoning":
        return ThinkingContent(thinking=part.text)
    return ToolUseContent(id=part.call_id, name=part.name, input=_arguments(part.text))


def _arguments(text: str) -> dict[str, object]:
    """The arguments of a call; {} if the text was cut off in them."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):  # cut off, or a number that JSON does not have
        return {}
    return value if isinstance(value, dict) else {}


def _event(kind: str, **fields: object) -> bytes:
    dumped = {name: value.model_dump() if isinstance(value, BaseModel) else value for name, value in fields.items()}
    return sse_event(json.dumps({"type": kind} | dumped, allow_nan=False).encode(), kind)
