"""Builds responses of `/v1/responses`, and the events of their streams."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence

from pydantic import BaseModel

from twotower.decoding.output import Event, Generation, StepEvent
from twotower.server.choices import Choice
from twotower.server.openai_responses.objects import (
    ErrorCode,
    IncompleteDetails,
    InputTokensDetails,
    ItemStatus,
    OutputFunctionCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    OutputTokensDetails,
    ReasoningPart,
    ResponseFailure,
    ResponseObject,
    ResponseStatus,
    ResponseUsage,
)
from twotower.server.openai_responses.request import ResponsesRequest
from twotower.server.reply_parts import PartEnd, PartEvent, PartStart, PartText, ReplyPart, ReplyParts
from twotower.server.request_errors import RequestError
from twotower.server.response_builder import ResponseBuilder, sse_event
from twotower.server.service import Service

PREFIXES = {"reasoning": "rs", "text": "msg", "call": "fc"}
ERROR_CODES: dict[int, ErrorCode] = {429: "rate_limit_exceeded"}


class ResponsesBuilder(ResponseBuilder):
    """Builds the response to one request of `/v1/responses`."""

    request: ResponsesRequest

    def __init__(self, service: Service, request: ResponsesRequest, choices: Sequence[Choice]) -> None:
        super().__init__(service, request, choices)
        (self._choice,) = choices
        self._model = service.settings.name
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._reply, self._parts = self._reader(self._choice), ReplyParts()
        self._ids: list[str] = []  # of the items
        self._sequence = 0  # number of the next event
        self._result: Generation | None = None

    def full_response(self, results: Sequence[Generation]) -> bytes:
        (self._result,) = results
        for _ in self._parts.take(self._reply.take(self._result.tokens, self._result.text, last=True), last=True):
            pass
        return json.dumps(_fields(self._response(self._end_status()))).encode()

    def first_events(self) -> Iterator[bytes]:
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._response("in_progress"))

    def events(self, choice: Choice, event: Event) -> Iterator[bytes]:
        if isinstance(event, StepEvent):
            yield self._event("response.denoising", denoising=self._denoising(choice, event))
            return
        self._result = event.result
        last = event.result is not None
        for part_event in self._parts.take(self._reply.take(event.tokens, event.text, last), last):
            yield from self._part_events(part_event)
        if committed := self._committed(choice, event):
            yield self._event("response.committed", **committed)

    def last_events(self) -> Iterator[bytes]:
        if not self._parts.parts:
            empty = ReplyPart(0, "text")
            for event in (PartStart(empty), PartEnd(empty)):
                yield from self._part_events(event)
        status = self._end_status()
        yield self._event(f"response.{status}", response=self._response(status))

    def error_events(self, error: RequestError) -> Iterator[bytes]:
        yield self._event("error", code=error.code, message=error.message, param=error.param)
        code = ERROR_CODES.get(error.status, "invalid_prompt" if error.status < 500 else "server_error")
        failure = ResponseFailure(code=code, message=error.message)
        yield self._event("response.failed", response=self._response("failed", failure))

    def _event(self, kind: str, **fields: object) -> bytes:
        numbered = {"type": kind, "sequence_number": self._sequence} | fields
        self._sequence += 1
        return sse_event(json.dumps(_fields(numbered), allow_nan=False).encode(), kind)

    def _part_events(self, event: PartEvent) -> Iterator[bytes]:
        """The events of what happens to a part. A part with a text is an item with one content."""
        part = event.part
        place: dict[str, object] = {"output_index": part.index}
        inner = place | {"item_id": self._item_id(part)}
        if isinstance(event, PartStart):
            yield self._event("response.output_item.added", item=self._item(part, "in_progress", empty=True), **place)
        yield from self._call_events(event, inner) if part.kind == "call" else self._text_events(event, inner)
        if isinstance(event, PartEnd):
            yield self._event("response.output_item.done", item=self._item(part, self._item_status(part)), **place)

    def _call_events(self, event: PartEvent, place: dict[str, object]) -> Iterator[bytes]:
        name = "response.function_call_arguments"
        match event:
            case PartText(_, text):
                yield self._event(f"{name}.delta", delta=text, **place)
            case PartEnd(part):
                yield self._event(f"{name}.done", name=part.name, arguments=part.text, **place)

    def _text_events(self, event: PartEvent, place: dict[str, object]) -> Iterator[bytes]:
        part = event.part
        summary = part.kind == "reasoning" and self.request.summarizes
        place = place | {"summary_index" if summary else "content_index": 0}
        frame = "response.reasoning_summary_part" if summary else "response.content_part"
        text = "reasoning_summary_text" if summary else "reasoning_text" if part.kind == "reasoning" else "output_text"
        more: dict[str, object] = {"logprobs": []} if part.kind == "text" else {}
        match event:
            case PartStart():
                yield self._event(f"{frame}.added", part=self._content(part, ""), **place)
            case PartText(_, delta):
                yield self._event(f"response.{text}.delta", delta=delta, **more, **place)
            case PartEnd():
                yield self._event(f"response.{text}.done", text=part.text, **more, **place)
                yield self._event(f"{frame}.done", part=self._content(part, part.text), **place)

    def _item_id(self, part: ReplyPart) -> str:
        while len(self._ids) <= part.index:
            self._ids.append(f"{PREFIXES[part.kind]}_{uuid.uuid4().hex}")
        return self._ids[part.index]

    def _item_status(self, part: ReplyPart) -> ItemStatus:
        """The status of a complete item: the last one of a text that was cut off is incomplete."""
        is_last = part.index >= len(self._parts.parts) - 1
        cut = is_last and self._result is not None and self._result.finish_reason == "length"
        return "incomplete" if cut else "completed"

    def _content(self, part: ReplyPart, text: str) -> OutputText | ReasoningPart:
        if part.kind == "text":
            return OutputText(text=text)
        return ReasoningPart(type="summary_text" if self.request.summarizes else "reasoning_text", text=text)

    def _item(self, part: ReplyPart, status: ItemStatus, empty: bool = False) -> OutputItem:
        """The item of a part. empty: without the text."""
        item_id, text = self._item_id(part), "" if empty else part.text
        if part.kind == "call":
            return OutputFunctionCall(id=item_id, status=status, call_id=part.call_id, name=part.name, arguments=text)
        contents = [] if empty else [self._content(part, text)]
        texts = [content for content in contents if isinstance(content, OutputText)]
        if part.kind == "text":
            return OutputMessage(id=item_id, status=status, content=texts)
        reasoning = [content for content in contents if isinstance(content, ReasoningPart)]
        in_summary = self.request.summarizes
        return OutputReasoning(
            id=item_id, status=status, summary=reasoning if in_summary else [], content=[] if in_summary else reasoning
        )

    def _end_status(self) -> ResponseStatus:
        assert self._result is not None
        return "incomplete" if self._result.finish_reason == "length" else "completed"

    def _response(self, status: ResponseStatus, failure: ResponseFailure | None = None) -> ResponseObject:
        request, params = self.request, self._choice.engine_request.params
        ended = status in ("completed", "incomplete")
        parts = self._parts.parts or ([ReplyPart(0, "text")] if ended else [])
        choice = request.tool_choice or "auto"
        reasoning = request.reasoning.model_dump(exclude={"generate_summary"}) if request.reasoning else {}
        text = request.text.model_dump(by_alias=True, exclude_unset=True) if request.text else {}
        return ResponseObject(
            id=self._id,
            created_at=self._created,
            completed_at=int(time.time()) if status == "completed" else None,
            status=status,
            error=failure,
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if status == "incomplete" else None,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            max_tool_calls=request.max_tool_calls,
            model=self._model,
            output=[self._item(part, self._item_status(part)) for part in parts] if status != "in_progress" else [],
            parallel_tool_calls=request.parallel_tool_calls is not False,
            reasoning={"effort": None, "summary": None} | reasoning,
            temperature=params.temperature,
            text={"format": {"type": "text"}} | text,
            tool_choice=choice if isinstance(choice, str) else choice.model_dump(),
            tools=[tool.model_dump() for tool in request.tools],
            top_p=params.top_p,
            usage=self._usage() if ended else None,
            user=request.user,
            metadata=request.metadata or {},
            decoding=self._decoding(self._choice, self._result) if ended and self._result else None,
        )

    def _usage(self) -> ResponseUsage:
        result = self._result
        assert result is not None
        written = len(result.tokens)
        return ResponseUsage(
            input_tokens=result.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=result.cached_tokens),
            output_tokens=written,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=self._reply.reasoning_tokens(result.tokens)),
            total_tokens=result.prompt_tokens + written,
            passes=result.passes,
            tokens_per_pass=round(result.tokens_per_pass, 4),
        )


def _fields(value: object) -> object:
    """Plain data for JSON."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    return {name: _fields(one) for name, one in value.items()} if isinstance(value, dict) else value
