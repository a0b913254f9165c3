"""The routes that generate text: each is a wire format around the same path of a request through the server."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from fastapi import FastAPI, Request, Response

from twotower.server.anthropic_messages.builder import MessagesBuilder
from twotower.server.anthropic_messages.objects import MessageObject, TokenCount
from twotower.server.anthropic_messages.request import MessagesRequest, PromptRequest
from twotower.server.chat_response import ChatResponseBuilder
from twotower.server.choices import Choice
from twotower.server.completion_requests import ChatCompletionRequest, CompletionRequest, GenerationRequest
from twotower.server.completion_response import CompletionResponseBuilder
from twotower.server.error_responses import ERROR_RESPONSES, MESSAGES_ERRORS
from twotower.server.openai_responses.builder import ResponsesBuilder
from twotower.server.openai_responses.objects import ResponseObject
from twotower.server.openai_responses.request import ResponsesRequest
from twotower.server.request_schemas import BaseRequest
from twotower.server.response_builder import ResponseBuilder
from twotower.server.response_schemas import ChatCompletion, Completion
from twotower.server.service import Service
from twotower.server.streaming import EventStreamResponse, event_stream, run_until_disconnect

RESPONSES_STREAM = "The response. With stream: true, server-sent events with the names of the Responses API."
MESSAGES_STREAM = "The response. With stream: true, server-sent events with the names of the Messages API."


def _streaming_response(chunk: str) -> dict[int | str, dict[str, object]]:
    """OpenAPI response of a route that also streams. chunk: schema of its chunks.

    Before OpenAPI 3.2, the schema of a stream is the schema of one event.
    """
    shapes = [{"$ref": f"#/components/schemas/{name}"} for name in (chunk, "ErrorBody")]
    chunk_schema = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": shapes}}
    event = {
        "type": "object",
        "title": "Event",
        "description": "data: a chunk as JSON, or an error that ends the stream. The last event is [DONE].",
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, chunk_schema]}},
        "required": ["data"],
    }
    words = "The response. With stream: true, server-sent events with its chunks, then [DONE]."
    return {200: {"description": words, "content": {"text/event-stream": {"schema": event}}}}


def _named_events_response(event: str, words: str) -> dict[int | str, dict[str, object]]:
    """OpenAPI response of a route whose streams have events with names. event: what an event has, beside its type."""
    described = {"type": "object", "title": event, "properties": {"type": {"type": "string"}}, "required": ["type"]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": described}
    schema = {
        "type": "object",
        "properties": {"event": {"type": "string"}, "data": data},
        "required": ["event", "data"],
    }
    return {200: {"description": words, "content": {"text/event-stream": {"schema": schema}}}}


def add_generation_routes(app: FastAPI, service: Service) -> None:
    """Adds the routes that generate text."""

    async def generate(
        request: GenerationRequest, raw_request: Request, builder_of: Callable[[list[Choice]], ResponseBuilder]
    ) -> Response:
        choices = await service.build_choices(request)
        _add_log_fields(raw_request, request, choices, service)
        builder = builder_of(choices)
        with ExitStack() as stack:
            stack.enter_context(service.admit(len(choices), raw_request.state.key))
            if request.stream:
                return EventStreamResponse(event_stream(service, builder, choices), stack.pop_all())
            results = await run_until_disconnect(raw_request, service.results(choices))
            return Response(builder.full_response(results), media_type="application/json")

    @app.post(
        "/v1/completions", response_model=Completion, responses=_streaming_response("Completion") | ERROR_RESPONSES
    )
    async def completions(request: CompletionRequest, raw_request: Request) -> Response:
        """Completes prompts. With `stream`, one chunk of final text for each block."""
        return await generate(request, raw_request, partial(CompletionResponseBuilder, service, request))

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=_streaming_response("ChatCompletionChunk") | ERROR_RESPONSES,
    )
    async def chat_completions(request: ChatCompletionRequest, raw_request: Request) -> Response:
        """Replies to a chat. With `stream`, one chunk of final text for each block."""
        return await generate(request, raw_request, partial(ChatResponseBuilder, service, request))

    @app.post(
        "/v1/responses",
        response_model=ResponseObject,
        responses=_named_events_response("ResponseEvent", RESPONSES_STREAM) | ERROR_RESPONSES,
    )
    async def responses(request: ResponsesRequest, raw_request: Request) -> Response:
        """Replies to a chat in the form of the Responses API. Nothing is kept."""
        return await generate(request, raw_request, partial(ResponsesBuilder, service, request))

    @app.post(
        "/v1/messages",
        response_model=MessageObject,
        responses=_named_events_response("MessageEvent", MESSAGES_STREAM) | MESSAGES_ERRORS,
    )
    async def messages(request: MessagesRequest, raw_request: Request) -> Response:
        """Replies to a chat in the form of the Messages API of Anthropic."""
        request_id = raw_request.state.request_id
        return await generate(request, raw_request, partial(MessagesBuilder, service, request, request_id))

    @app.post("/v1/messages/count_tokens", responses=MESSAGES_ERRORS)
    async def count_tokens(request: PromptRequest) -> TokenCount:
        """The number of tokens of the prompt of a request to `/v1/messages`."""
        return TokenCount(input_tokens=await service.count_tokens(request))


def _add_log_fields(raw_request: Request, request: BaseRequest, choices: list[Choice], service: Service) -> None:
    """Adds the facts of a request to its log line; prompts only with `--log-prompts`."""
    log_fields = raw_request.state.log_fields
    log_fields |= {
        "mode": choices[0].engine_request.params.mode,
        "choices": len(choices),
        "prompt_tokens": sum(len(choice.engine_request.prompt) for choice in choices[:: request.choice_count]),
        "max_tokens": choices[0].engine_request.params.max_new_tokens,
        "stream": request.stream,
    }
    if request.user:
        log_fields["user"] = request.user
    if service.settings.log_prompts:
        log_fields["prompts"] = [
            service.tokenizer.decode(choice.engine_request.prompt) for choice in choices[:: request.choice_count]
        ]
