"""`twotower serve --replicas N`: runs replicas with Ray Serve until a signal."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from twotower.errors import ArgumentError, TwoTowerError
from twotower.model_loading import check_source, source_of
from twotower.ray.builder import check_suited, named_gpus
from twotower.ray.cluster import (
    ActorSize,
    check_room,
    check_workers,
    connected,
    gpus_of_cluster,
    import_ray,
    last_line,
)
from twotower.server.logs import configure_logging, log_event
from twotower.server.options import Door, ServiceOptions

APPLICATION = "twotower"
CONTROLLER = {"name": "SERVE_CONTROLLER_ACTOR", "namespace": "serve"}  # the actor of Ray Serve on a cluster


def run_replicas(
    options: ServiceOptions,
    door: Door,
    replicas: int,
    host: str,
    port: int,
    drain: int,
    listening: Callable[[str], object],
) -> None:
    """Serves replicas until a signal; a second signal stops at once. listening: called with the address.

    drain: seconds that running requests have to finish.

    Raises:
        TwoTowerError: Ray is not installed, the cluster has no room, or a replica cannot start.
    """
    check_suited(options)
    check_source(source_of(options.model))
    serve = import_ray("--replicas", "ray.serve")
    with connected(worker_logs=True):
        _check_no_serve()
        on_cpu = options.context_device is not None and options.context_device.startswith("cpu")
        gpus = named_gpus(options) or int(not on_cpu and gpus_of_cluster() > 0)
        check_room("--replicas", replicas, ActorSize.of(options.threads, gpus))
        check_workers()
        try:
            _start(options, door, replicas, gpus, host, port, drain)
            with _first_signal() as stopped:
                listening(f"http://{f'[{host}]' if ':' in host else host}:{port}")
                stopped.wait()
                serve.delete(APPLICATION)  # waits for running requests
        finally:
            serve.shutdown()


def _start(options: ServiceOptions, door: Door, replicas: int, gpus: int, host: str, port: int, drain: int) -> None:
    from ray import serve
    from ray.serve.schema import LoggingConfig

    from twotower.ray.replica import application

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
    target = application(options.for_nodes(), door, replicas, gpus, drain)
    try:
        serve.run(target, name=APPLICATION, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        status = serve.status().applications.get(APPLICATION)
        reasons = [each.message for each in status.deployments.values()] if status else [str(error)]
        raise TwoTowerError(f"a replica cannot start: {last_line(reasons[0])}") from None


def _check_no_serve() -> None:
    from ray.util import list_named_actors

    if CONTROLLER in list_named_actors(all_namespaces=True):
        raise ArgumentError(
            "Ray Serve runs on this cluster already; add the model to it with `serve run twotower.ray:app`, or end it "
            "with `serve shutdown`"
        )


@contextmanager
def _first_signal() -> Iterator[threading.Event]:
    """Yields an event that the first SIGTERM or Ctrl-C sets. The second one raises KeyboardInterrupt."""
    stopped = threading.Event()
    configure_logging()

    def handle(number: int, frame: FrameType | None) -> None:
        log_event("stopping", signal=signal.Signals(number).name, now=stopped.is_set())
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
