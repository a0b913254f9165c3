"""A Ray cluster: connects to it, and checks before the work whether its nodes can do it. An error is one line."""

from __future__ import annotations

import importlib
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TypedDict

from twotower import options
from twotower.errors import ArgumentError, install_command
from twotower.version import VERSION

WORKER_SECONDS = 180.0  # in which a node must start a worker process
CONNECT_SECONDS = 10.0  # in which the cluster must accept a connection
SPARE_CPU = 0.5  # of the CPUs of an actor: with as many actors as CPUs, Ray Data's reads and writes need a CPU too


@dataclass(frozen=True)
class ActorSize:
    """What Ray reserves for an actor. cpus: may be a fraction; it does not limit the threads. gpus: whole ones."""

    cpus: float
    gpus: int = 0

    @classmethod
    def of(cls, threads: int | None, gpus: int = 0) -> ActorSize:
        """threads: CPU threads of the actor; None: chosen when the model is loaded, so one is counted."""
        return cls((threads or 1) - SPARE_CPU, gpus)

    def fits_in(self, resources: Mapping[str, float]) -> int:
        """The number of actors that a node with these resources can hold."""
        by_cpus = resources.get("CPU", 0) / self.cpus
        by_gpus = resources.get("GPU", 0) / self.gpus if self.gpus else by_cpus
        return int(min(by_cpus, by_gpus))


class ClusterNode(TypedDict):
    """What Ray tells about a node."""

    NodeID: str
    NodeManagerAddress: str
    Alive: bool
    Resources: dict[str, float]


class ActorOptions(TypedDict, total=False):
    """Arguments of `Dataset.map_batches` for the actors of a `TwoTowerPredictor`."""

    compute: object
    num_cpus: float
    num_gpus: float
    runtime_env: dict[str, object]


def actor_options(actors: int, *, gpus: int = 0, threads: int | None = None) -> ActorOptions:
    """The arguments of `Dataset.map_batches` for a pool of `actors` actors.

    gpus: GPUs of an actor, 1 for each device of the model. threads: its CPU threads, as in `TwoTowerPredictor`. An
    actor reserves half a CPU less than it has threads, because a read or a write of Ray Data needs a CPU as well.

    Raises:
        ArgumentError: actors is less than 1, or Ray is not installed.
    """
    check_count("actors", actors)
    data = import_ray("Ray Data", "ray.data")
    size = ActorSize.of(threads, gpus)
    pool = data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2)
    return {"compute": pool, "num_cpus": size.cpus, "num_gpus": size.gpus, **worker_environment()}


def worker_environment() -> ActorOptions:
    """The option `runtime_env` with the variables of this package that are set; empty if none is set.

    API keys are left out: Ray shows the environment of a worker to every user of the cluster.
    """
    found = options.set_variables(os.environ)
    return {"runtime_env": {"env_vars": found}} if found else {}


def check_count(option: str, count: object) -> None:
    """Raises ArgumentError unless `count` is a whole number of at least 1."""
    if type(count) is not int or count < 1:
        raise ArgumentError(f"{option} is {count!r}; give a whole number of at least 1", param=option)


def import_ray(purpose: str, module: str = "ray") -> ModuleType:
    """Imports a module of Ray.

    Raises:
        ArgumentError: Ray, or a package that this part of Ray needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = "ray" if (error.name or module).startswith("ray.") else error.name or module
        raise ArgumentError(f"{purpose} needs {missing}; install it: {install_command('ray')}") from None


@contextmanager
def connected(*, worker_logs: bool) -> Iterator[None]:
    """Connects this process to the cluster of RAY_ADDRESS, else to one of this machine, which is started if needed.

    A process that is connected already stays so. worker_logs: whether stderr gets the output of workers.

    Raises:
        ArgumentError: there is no such cluster.
    """
    ray = import_ray("a cluster")
    if ray.is_initialized():
        yield
        return
    check_address(os.environ.get("RAY_ADDRESS", ""))
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=worker_logs, include_dashboard=False)
    except Exception as error:  # Ray raises many types; the user needs one line
        address = os.environ.get("RAY_ADDRESS") or "of this machine"
        raise ArgumentError(
            f"cannot connect to the Ray cluster {address} ({_last_line(error)}); check RAY_ADDRESS and "
            "RAY_AUTH_TOKEN, or unset RAY_ADDRESS to start a cluster here"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Raises ArgumentError if nothing answers at HOST:PORT, because Ray would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or "/" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ArgumentError(
            f"RAY_ADDRESS is {address!r}, and nothing answers there ({error.strerror or error}); correct it, or unset "
            "it to start a cluster here"
        ) from None


def check_workers() -> None:
    """Checks that every node of the cluster has this version of the package.

    Raises:
        ArgumentError: a node lacks it, has another version, or starts no worker process.
    """
    ray = import_ray("a cluster")
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = _live_nodes(ray)
    probe = ray.remote(num_cpus=0, max_retries=0, **worker_environment())(_probe())
    asked: dict[object, object] = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[probe.options(scheduling_strategy=there).remote()] = node["NodeManagerAddress"]
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=WORKER_SECONDS)
    if late:
        raise ArgumentError(
            f"the Ray node {asked[late[0]]} started no worker in {WORKER_SECONDS:.0f} s; check its logs"
        )
    for answer in done:
        address = asked[answer]
        try:
            found = ray.get(answer)
        except Exception as error:  # Ray raises many types; the user needs one line
            raise ArgumentError(
                f"the Ray node {address} cannot run a task ({_last_line(error)}); check its logs"
            ) from None
        if not found:
            raise ArgumentError(f"the Ray node {address} lacks twotower; install it there: {install_command('ray')}")
        if found != VERSION:
            raise ArgumentError(
                f"the Ray node {address} has twotower {found}, and this program is {VERSION}; install the same version"
            )


def _probe() -> Callable[[], str]:
    def version() -> str:  # a local function is shipped as code, so that a node without the package can run it
        try:
            from twotower.version import VERSION
        except ImportError:
            return ""
        return VERSION

    return version


def check_room(option: str, count: int, size: ActorSize) -> None:
    """Checks that the free resources of the cluster hold `count` actors, so that no actor waits without an end.

    option: the name of the option, for the message.

    Raises:
        ArgumentError: they do not.
    """
    ray = import_ray("a cluster")
    held = sum(size.fits_in(node["Resources"]) for node in _live_nodes(ray))
    free = min(held, size.fits_in(ray.available_resources()))
    if count <= free:
        return
    needs = f"{size.cpus * count:g} CPUs" + (f" and {size.gpus * count} GPUs" if size.gpus else "")
    total, rest = _words(ray.cluster_resources(), size), _words(ray.available_resources(), size)
    remedy = f"give at most {free}" if free else "wait until others end, or add a node"
    raise ArgumentError(f"{option} {count} needs {needs}, and the Ray cluster has {total} (free: {rest}); {remedy}")


def gpus_of_cluster() -> int:
    """The number of GPUs of the cluster."""
    return int(import_ray("a cluster").cluster_resources().get("GPU", 0))


def nodes_of_cluster() -> int:
    """The number of nodes of the cluster."""
    return len(_live_nodes(import_ray("a cluster")))


def _live_nodes(ray: ModuleType) -> list[ClusterNode]:
    return [node for node in ray.nodes() if node["Alive"]]


def _words(resources: Mapping[str, float], size: ActorSize) -> str:
    return f"{resources.get('CPU', 0):g} CPUs" + (f" and {resources.get('GPU', 0):g} GPUs" if size.gpus else "")


def _last_line(error: BaseException) -> str:
    return last_line(str(error)) or type(error).__name__


def last_line(text: str) -> str:
    """The last line of a message that has a traceback, which is the error itself."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^twotower\.errors\.\w+: ", "", lines[-1]) if lines else ""
