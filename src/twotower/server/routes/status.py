"""Routes about the server: its models, health, readiness, version and metrics."""

from __future__ import annotations

from fastapi import FastAPI, Response

from twotower.server.error_responses import ERROR_RESPONSES
from twotower.server.model_cards import model_card
from twotower.server.request_errors import RequestError
from twotower.server.response_schemas import ModelCard, ModelList
from twotower.server.service import Service
from twotower.version import VERSION


def add_status_routes(app: FastAPI, service: Service) -> None:
    """Adds the routes."""

    @app.get("/v1/models", responses={401: ERROR_RESPONSES[401]})
    async def models() -> ModelList:
        """The list of models: the served model under each of its names."""
        return ModelList(data=[model_card(service, name) for name in service.names])

    @app.get("/v1/models/{name:path}", responses={401: ERROR_RESPONSES[401], 404: ERROR_RESPONSES[404]})
    async def model(name: str) -> ModelCard:
        """The served model, by its name."""
        service.check_model_name(name)
        return model_card(service, name if name in service.names else service.settings.name)

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
        return Response(await service.expositions(), media_type="text/plain; version=0.0.4")

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The version of this package."""
        return {"version": VERSION}

    @app.get("/ping", responses={503: ERROR_RESPONSES[503]})
    @app.post("/ping", responses={503: ERROR_RESPONSES[503]}, operation_id="ping_post")
    async def ping() -> dict[str, str]:
        """As `/health`."""
        return await health()
