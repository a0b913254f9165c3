"""A replica of the server in Ray Serve: the whole server, with its own model and engine."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ray import serve
from ray.serve.schema import LoggingConfig

from twotower import model_loading
from twotower.process import configure_process
from twotower.ray.cluster import ActorSize, worker_environment
from twotower.ray.replica_metrics import merged
from twotower.server.app import create_app
from twotower.server.building import NO_TOKENIZER, build_service
from twotower.server.logs import configure_logging
from twotower.server.options import Door, ServiceOptions

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

DEPLOYMENT = "TwoTower"
HEALTH_SECONDS = 2.0  # between two checks of a replica
METRICS_SECONDS = 5.0  # in which the replicas must send their metrics
MORE_REQUESTS = 64  # of a replica, beside those that run or wait: of models, health and metrics


@serve.ingress()
class TwoTower:
    """Made where it runs: what Ray ships is options, never a model."""

    def __init__(self, options: ServiceOptions, door: Door) -> None:
        configure_logging()
        configure_process(options.threads)
        source = model_loading.source_of(options.model)
        model = model_loading.load_text_model(
            source,
            NO_TOKENIZER,
            dtype=options.dtype,
            quantization=options.quantization,
            context_device=options.context_device,
            denoiser_device=options.denoiser_device,
            one_tower=True,
        )
        self.service = build_service(options, door, model, source, lambda text: print(text, file=sys.stderr))
        self.service.expositions = self.of_all_replicas
        self.replica = serve.get_replica_context()

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = create_app(self.service)
        app.add_middleware(WithoutRequestId)
        return app

    async def check_health(self) -> None:
        """Ray Serve calls it, and replaces the replica if it raises."""
        if not self.service.alive:
            raise RuntimeError(self.service.engine.failure)

    async def exposition(self) -> tuple[str, bytes]:
        """The name of this replica and its metrics."""
        return self.replica.replica_id.unique_id, self.service.metrics.exposition()

    async def of_all_replicas(self) -> bytes:
        """The metrics of all replicas that answer, each with the label `replica`."""
        handle = serve.get_deployment_handle(DEPLOYMENT, self.replica.app_name)
        answers = await handle.broadcast("exposition").results_async(timeout_s=METRICS_SECONDS, return_exceptions=True)
        return merged([answer for answer in answers if not isinstance(answer, BaseException)])


class WithoutRequestId:
    """Removes the header `x-request-id` of responses, because Ray Serve adds the same one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [header for header in message.get("headers", ()) if header[0].lower() != b"x-request-id"]
                message = {**message, "headers": kept}
            await send(message)

        await self.app(scope, receive, send_without)


def application(options: ServiceOptions, door: Door, replicas: int, gpus: int, drain: int) -> serve.Application:
    """The application of Ray Serve with these replicas.

    gpus: of a replica. drain: seconds that running requests have when a replica ends.
    """
    size = ActorSize.of(options.threads, gpus)
    deployment = serve.deployment(
        TwoTower,
        name=DEPLOYMENT,
        num_replicas=replicas,
        max_ongoing_requests=options.rows + options.queue + MORE_REQUESTS,
        max_constructor_retry_count=1,
        ray_actor_options={"num_cpus": size.cpus, "num_gpus": size.gpus, **worker_environment()},
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=drain,
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    return deployment.bind(options, door)
