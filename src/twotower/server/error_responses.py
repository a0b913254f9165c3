"""Error statuses in the OpenAPI schema, and the responses to errors that routes raise."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from twotower.server.anthropic_messages.objects import MessagesErrorBody
from twotower.server.middleware import error_response
from twotower.server.request_errors import ClientDisconnected, RequestError
from twotower.server.response_schemas import ErrorBody
from twotower.server.validation_errors import validation_error

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


def _error_responses(body: type[BaseModel]) -> dict[int | str, dict[str, object]]:
    return {status: {"description": meaning, "model": body} for status, meaning in ERROR_DESCRIPTIONS.items()}


ERROR_RESPONSES = _error_responses(ErrorBody)
MESSAGES_ERRORS = _error_responses(MessagesErrorBody)

# Routes of the OpenAI API that have no use here → what they are for.
NOT_SERVED = {
    "/v1/embeddings": "embeddings are",
    "/v1/moderations": "moderation is",
    "/v1/audio": "audio is",
    "/v1/images": "images are",
    "/v1/files": "files are",
    "/v1/batches": "batches are",
    "/v1/fine_tuning": "fine-tuning is",
    "/v1/assistants": "assistants are",
    "/v1/threads": "assistants are",
    "/v1/responses": "responses are not kept, so stored ones are",
    "/v1/conversations": "conversations are not kept, so they are",
    "/v1/rerank": "reranking is",
    "/v1/score": "scoring of pairs is",
}


def add_error_handlers(app: FastAPI) -> None:
    """Adds the responses to errors: JSON bodies in the form of the API that the path belongs to."""

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return error_response(error, request.scope)

    @app.exception_handler(ClientDisconnected)
    async def disconnected(_: Request, __: ClientDisconnected) -> Response:
        return Response(status_code=499)  # for the log and the metrics: the client is gone

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return error_response(validation_error(error), request.scope)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code == 404:
            message = unknown_path(app, request)
        elif error.status_code == 405:
            message = "this path does not accept this method; the header Allow lists the accepted methods"
        headers = dict(error.headers or {})
        if "GET" in (allowed := headers.get("Allow", "")):
            headers["Allow"] = f"{allowed}, HEAD"  # see `ServerMiddleware`
        return error_response(RequestError(message, status=error.status_code), request.scope, headers)


def unknown_path(app: FastAPI, request: Request) -> str:
    """The message for a path that does not exist: the routes under /v1, or where to find all routes."""
    path = request.scope["path"].removeprefix(request.scope["root_path"])
    if path != "/v1" and not path.startswith("/v1/"):
        return "this path does not exist; /openapi.json lists the paths"
    served = [route for route in app.openapi()["paths"] if route.startswith("/v1/") and "{" not in route]
    kind = next((kind for start, kind in NOT_SERVED.items() if path == start or path.startswith(f"{start}/")), None)
    words = "this path does not exist" if kind is None else f"{kind} not served"
    return f"{words}; the routes under /v1 are {', '.join(served)}"
