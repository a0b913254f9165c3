"""The routes of the server, and its OpenAPI schema."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

from fastapi import FastAPI, Request, Response
from starlette.middleware.cors import CORSMiddleware

from twotower.server.chat_response import ChatResponseBuilder
from twotower.server.choices import Choice
from twotower.server.completion_response import CompletionResponseBuilder
from twotower.server.error_responses import ERROR_RESPONSES, add_error_handlers
from twotower.server.middleware import ServerMiddleware
from twotower.server.page import add_page
from twotower.server.request_schemas import BaseRequest, ChatCompletionRequest, CompletionRequest, GenerationRequest
from twotower.server.response_builder import ResponseBuilder
from twotower.server.response_schemas import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
)
from twotower.server.routes.status import add_status_routes
from twotower.server.service import Service
from twotower.server.streaming import EventStreamResponse, event_stream, run_until_disconnect
from twotower.version import VERSION


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


def create_app(service: Service) -> FastAPI:
    """The ASGI app of a service. At shutdown the app stops the engine of the service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="twotower",
        version=VERSION,
        description="Two-tower diffusion language models with the endpoints of the OpenAI API.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from other hosts
        redoc_url=None,
    )
    app.add_middleware(ServerMiddleware, service=service)
    if service.settings.allowed_origins:  # around the other middleware, so that errors have the headers too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.allowed_origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "retry-after"),
        )
    add_error_handlers(app)
    _add_generation_routes(app, service)
    add_status_routes(app, service)
    add_page(app)
    _complete_schema(app)
    return app


def _add_generation_routes(app: FastAPI, service: Service) -> None:
    async def generate(request: GenerationRequest, raw_request: Request) -> Response:
        choices = await service.build_choices(request)
        _add_log_fields(raw_request, request, choices, service)
        builder: ResponseBuilder
        if isinstance(request, ChatCompletionRequest):
            builder = ChatResponseBuilder(service, request, choices)
        else:
            builder = CompletionResponseBuilder(service, request, choices)
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
        return await generate(request, raw_request)

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=_streaming_response("ChatCompletionChunk") | ERROR_RESPONSES,
    )
    async def chat_completions(request: ChatCompletionRequest, raw_request: Request) -> Response:
        """Replies to a chat. With `stream`, one chunk of final text for each block."""
        return await generate(request, raw_request)


def _add_log_fields(raw_request: Request, request: BaseRequest, choices: list[Choice], service: Service) -> None:
    """Adds the facts of a request to its log line; prompts only with `--log-prompts`."""
    log_fields = raw_request.state.log_fields
    log_fields |= {
        "mode": choices[0].engine_request.params.mode,
        "choices": len(choices),
        "prompt_tokens": sum(len(choice.engine_request.prompt) for choice in choices[:: request.n]),
        "max_tokens": choices[0].engine_request.params.max_new_tokens,
        "stream": request.stream,
    }
    if request.user:
        log_fields["user"] = request.user
    if service.settings.log_prompts:
        log_fields["prompts"] = [
            service.tokenizer.decode(choice.engine_request.prompt) for choice in choices[:: request.n]
        ]


def _complete_schema(app: FastAPI) -> None:
    """Corrects FastAPI's schema: invalid requests get 400 instead of 422, and chat streams have their own chunks."""
    schema = app.openapi()
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    chunk = ChatCompletionChunk.model_json_schema(ref_template="#/components/schemas/{model}")
    schema["components"]["schemas"] |= chunk.pop("$defs") | {"ChatCompletionChunk": chunk}
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    app.openapi_schema = schema
