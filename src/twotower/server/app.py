"""The routes of the server, and its OpenAPI schema."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from twotower.server.error_responses import add_error_handlers
from twotower.server.middleware import ServerMiddleware
from twotower.server.page import add_page
from twotower.server.response_schemas import ChatCompletionChunk
from twotower.server.routes.docs import add_docs_page
from twotower.server.routes.generation import add_generation_routes
from twotower.server.routes.ollama import add_ollama_routes
from twotower.server.routes.status import add_status_routes
from twotower.server.routes.tokens import add_token_routes
from twotower.server.service import Service
from twotower.version import VERSION


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
    add_generation_routes(app, service)
    add_status_routes(app, service)
    add_token_routes(app, service)
    add_ollama_routes(app, service)
    add_page(app)
    add_docs_page(app)
    _complete_schema(app)  # last, because FastAPI makes the schema anew after another route
    return app


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
