"""The routes of the server, and its OpenAPI schema."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from twotower.server.chat_response import ChatResponseBuilder
from twotower.server.choices import Choice
from twotower.server.completion_response import CompletionResponseBuilder
from twotower.server.middleware import ServerMiddleware, error_response
from twotower.server.model_cards import model_card
from twotower.server.page import add_page
from twotower.server.request_errors import ClientDisconnected, RequestError
from twotower.server.request_schemas import BaseRequest, ChatCompletionRequest, CompletionRequest, GenerationRequest
from twotower.server.response_builder import ResponseBuilder
from twotower.server.response_schemas import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    ErrorBody,
    ModelCard,
    ModelList,
)
from twotower.server.service import Service
from twotower.server.streaming import EventStreamResponse, event_stream, run_until_disconnect
from twotower.server.validation_errors import validation_error
from twotower.version import VERSION

ERROR_DESCRIPTIONS = {
    400: "The request is invalid. The error names the field and the reason.",
    401: "The API key is missing or wrong.",
    404: "The server has no model of this name.",
    408: "The body did not arrive in time.",
    413: "The body is too long.",
    415: "The body has an unknown content-encoding.",
    429: "Too many requests. The header Retry-After has the seconds to wait.",
    503: "The server is stopping, or its engine has failed.",
    504: "The request took longer than the server's time limit.",
}
ERROR_RESPONSES: dict[int | str, dict[str, object]] = {
    status: {"description": meaning, "model": ErrorBody} for status, meaning in ERROR_DESCRIPTIONS.items()
}


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
    _add_error_handlers(app)
    _add_generation_routes(app, service)
    _add_status_routes(app, service)
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


def _add_status_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", responses={401: ERROR_RESPONSES[401]})
    async def models() -> ModelList:
        """The list of models, with the served model as its only entry."""
        return ModelList(data=[model_card(service)])

    @app.get("/v1/models/{name:path}", responses={401: ERROR_RESPONSES[401], 404: ERROR_RESPONSES[404]})
    async def model(name: str) -> ModelCard:
        """The served model, by its name."""
        service.check_model_name(name)
        return model_card(service)

    @app.get("/health", responses={503: ERROR_RESPONSES[503]})
    async def health() -> dict[str, str]:
        """Status 200 while the engine runs."""
        if not service.alive:
            raise RequestError("the engine has failed; restart the server", status=503, code="engine")
        return {"status": "ok"}

    @app.get("/ready", responses={503: ERROR_RESPONSES[503]})
    async def readiness() -> dict[str, str]:
        """Status 200 while the server accepts new requests, and they can be expected to succeed."""
        if service.draining:
            words = "the server is stopping; send the request to another server or retry after a restart"
            raise RequestError(words, status=503, code="stopping")
        if problem := service.readiness.problem():
            raise RequestError(problem, status=503, code="engine")
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Metrics in the Prometheus text format."""
        return Response(service.metrics.exposition(), media_type="text/plain; version=0.0.4")


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


# --- errors -----------------------------------------------------------------------------------------------------------


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return error_response(error)

    @app.exception_handler(ClientDisconnected)
    async def disconnected(_: Request, __: ClientDisconnected) -> Response:
        return Response(status_code=499)  # for the log and the metrics: the client is gone

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return error_response(validation_error(error))

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> Response:
        words = {
            404: "this path does not exist; /openapi.json lists the paths",
            405: "this path does not accept this method; the header Allow lists the accepted methods",
        }
        message = words.get(error.status_code, str(error.detail))
        headers = dict(error.headers or {})
        if "GET" in (allowed := headers.get("Allow", "")):
            headers["Allow"] = f"{allowed}, HEAD"  # see `ServerMiddleware`
        return error_response(RequestError(message, status=error.status_code), headers)


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
