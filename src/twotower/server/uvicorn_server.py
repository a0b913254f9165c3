"""Runs the server: the first SIGTERM or Ctrl-C lets requests finish, the second stops at once."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from twotower.server.app import create_app
from twotower.server.http_timeouts import TimeoutH11Protocol
from twotower.server.logs import configure_logging, log_event
from twotower.server.service import Service

MAX_CONNECTIONS = 2048  # further connections get 503
KEEPALIVE_TIMEOUT = 75  # seconds until an idle connection is closed


class DrainingServer(uvicorn.Server):
    """A uvicorn server that calls `listening` with its address, and drains requests at the first signal."""

    def __init__(self, config: uvicorn.Config, service: Service, listening: Callable[[str], object]) -> None:
        super().__init__(config)
        self.service, self.listening = service, listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self.listening(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # the engine's thread must end before the process
            await self.lifespan.shutdown()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.draining = True
        if self.should_exit:
            self.force_exit = True
        log_event("stopping", signal=signal.Signals(sig).name, open=self.service.active_choices, now=self.force_exit)
        self.should_exit = True


def create_server(
    service: Service, host: str, port: int, drain: int, listening: Callable[[str], object]
) -> DrainingServer:
    """Builds the server of a service.

    drain: seconds that running requests have to finish. listening: called with the address of the open socket.
    """
    config = uvicorn.Config(
        create_app(service),
        host=host,
        port=port,
        http=TimeoutH11Protocol,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEPALIVE_TIMEOUT,
        timeout_graceful_shutdown=drain,
    )
    return DrainingServer(config, service, listening)


def serve_until_signal(service: Service, host: str, port: int, drain: int, listening: Callable[[str], object]) -> None:
    """Runs a server until a signal stops it. See `create_server`."""
    configure_logging()
    try:
        create_server(service, host, port, drain, listening).run()
    finally:
        service.close()  # in case the shutdown of the app did not run
