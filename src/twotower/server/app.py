"""The routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from twotower.server.choices import Choice
from twotower.server.middleware import ServerMiddleware, error_response
from twotower.server.page import add_page
from twotower.server.request_errors import ClientDisconnected, RequestError
from twotower.server.request_schemas import BaseRequest, ChatCompletionRequest, CompletionRequest, GenerationRequest
from twotower.server.response_builder import model_card, response_builder_for
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
from twotower.version import VERSION

ERROR_DESCRIPTIONS = {
    400: "The request cannot be done; says why, and which field.",
    401: "No valid API key.",
    404: "No such model.",
    408: "The body did not arrive in time.",
    413: "The body is too long.",
    429: "Too many requests; Retry-After says when to come again.",
    503: "The server is stopping, or its engine failed.",
    504: "It took too long.",
}
ERROR_RESPONSES: dict[int | str, dict[str, object]] = {
    status: {"description": meaning, "model": ErrorBody} for status, meaning in ERROR_DESCRIPTIONS.items()
}


def _streaming_response(chunk: str) -> dict[int | str, dict[str, object]]:
    """The successful answer of a path that streams such chunks: before version 3.2 of the specification, a stream's
    schema is that of each event."""
    shapes = [{"$ref": f"#/components/schemas/{name}"} for name in (chunk, "ErrorBody")]
    chunk_schema = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": shapes}}
    event = {
        "type": "object",
        "title": "Event",
        "description": "data: a chunk as JSON; where something went wrong, an error; at the end [DONE].",
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, chunk_schema]}},
        "required": ["data"],
    }
    words = "The answer; with stream: true, server-sent events with chunks of it, and [DONE] at the end."
    return {200: {"description": words, "content": {"text/event-stream": {"schema": event}}}}


def create_app(service: Service) -> FastAPI:
    """The HTTP side of a service; it ends the service's engine when the server stops."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="twotower",
        version=VERSION,
        description="Two-tower diffusion language models behind the OpenAI endpoints.",
        lifespan=lifespan,
        docs_url=None,  # its pages would fetch their code from elsewhere
        redoc_url=None,
    )
    app.add_middleware(ServerMiddleware, service=service)
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
        builder = response_builder_for(service, request, choices)
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
        """Continues prompts. With `stream`, one chunk of final text for each block."""
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
        """The served model."""
        return ModelList(data=[model_card(service)])

    @app.get("/v1/models/{name:path}", responses={401: ERROR_RESPONSES[401], 404: ERROR_RESPONSES[404]})
    async def model(name: str) -> ModelCard:
        """A model by its name."""
        service.check_model_name(name)
        return model_card(service)

    @app.get("/health", responses={503: ERROR_RESPONSES[503]})
    async def health() -> dict[str, str]:
        """Whether the engine runs."""
        if not service.alive:
            raise RequestError("the engine has failed; start the server again", status=503, code="engine")
        return {"status": "ok"}

    @app.get("/ready", responses={503: ERROR_RESPONSES[503]})
    async def ready() -> dict[str, str]:
        """Whether new requests are taken."""
        if service.draining or not service.alive:
            raise RequestError("the server is stopping", status=503, code="stopping")
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.exposition(), media_type="text/plain; version=0.0.4")


def _add_log_fields(raw_request: Request, request: BaseRequest, choices: list[Choice], service: Service) -> None:
    """What the log says of a request. Its texts only where the server was asked for that."""
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
        return Response(status_code=499)  # nobody reads it; the log does

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return error_response(_validation_message(error))

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> Response:
        words = {404: "there is no such path; see /openapi.json", 405: "this path takes another method"}
        message = words.get(error.status_code, str(error.detail))
        return error_response(RequestError(message, status=error.status_code), dict(error.headers or {}))


def _validation_message(error: RequestValidationError) -> RequestError:
    """The error furthest inside the body, in one line: of a value that fits none of several types, all are
    told, and the one that got furthest says most."""
    found = max(error.errors(), key=lambda one: len(one["loc"]))
    names = [str(part) for part in found["loc"] if part != "body"]
    field = names[0] if names else None
    place = ".".join(name for name in names if "[" not in name and name not in ("str", "int"))
    match found["type"]:
        case "json_invalid":
            return RequestError(f"the body is not JSON: {found.get('ctx', {}).get('error', '')}", code="json")
        case "missing" if field is None:
            return RequestError("the body is empty; send a JSON object", code="json")
        case "missing":
            return RequestError(f"{place} is missing", param=field, code="missing")
        case "extra_forbidden":
            words = f"{place} is not a field that this server knows; see /openapi.json"
            return RequestError(words, param=field, code="unsupported")
        case "model_attributes_type" | "dict_type" if field is None:
            return RequestError("the body is no JSON object, sent as application/json", code="json")
    message = str(found["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    value = repr(found["input"])
    shown = value if len(value) <= 80 else value[:77] + "…"
    return RequestError(f"{place or 'the body'} is {shown}; it {message}", param=field, code="invalid")


def _complete_schema(app: FastAPI) -> None:
    """Takes the framework's own 422 out of the schema (what is invalid gets 400 here), and puts the chunks of a chat's
    stream in."""
    schema = app.openapi()
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    chunk = ChatCompletionChunk.model_json_schema(ref_template="#/components/schemas/{model}")
    schema["components"]["schemas"] |= chunk.pop("$defs") | {"ChatCompletionChunk": chunk}
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    app.openapi_schema = schema
