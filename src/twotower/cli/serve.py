"""`twotower serve`: an HTTP server with the OpenAI endpoints and a web page."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from twotower.cli import model_options as models
from twotower.errors import ArgumentError, install_command

if TYPE_CHECKING:
    from twotower.server.options import Door, ServiceOptions


@click.command()
@models.model_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on. 0.0.0.0: all addresses.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on. 0: any free port.",
)
@click.option(
    "--name",
    multiple=True,
    help="Name of the model for clients. Repeatable; responses have the first.  [default: the name of its directory]",
)
@click.option(
    "-s",
    "--setting",
    metavar="MODE[:VALUE,NAME=X…]",
    help="Default mode and decoding parameters of requests, e.g. auto, diffusion:0.8.  [default: verified; ar with the "
    "context tower alone]",
)
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Number of sequences that are generated at once.",
)
@click.option(
    "--length",
    metavar="N",
    type=click.IntRange(min=2),
    help="Maximum tokens of a sequence, prompt included.  [default: the model's context window, at most 8192]",
)
@click.option(
    "--block-size",
    metavar="N",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Largest block size that requests may use.",
)
@click.option(
    "--memory",
    metavar="GIB",
    type=click.FloatRange(min=0, min_open=True),
    help="Memory for KV caches and Mamba states, in GiB.  [default: enough for --rows sequences of --length tokens]",
)
@click.option(
    "--queue",
    metavar="N",
    type=click.IntRange(min=0),
    default=256,
    show_default=True,
    help="Number of sequences that may wait.",
)
@click.option(
    "--api-keys",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with one API key per line. TWOTOWER_API_KEYS adds keys, separated by commas.  [default: no key needed]",
)
@click.option(
    "--per-key",
    metavar="N",
    type=click.IntRange(min=1),
    help="Maximum sequences of one API key at once, waiting ones included.",
)
@click.option("--max-prompt", metavar="N", type=click.IntRange(min=1), help="Maximum tokens of a prompt.")
@click.option("--max-tokens", metavar="N", type=click.IntRange(min=1), help="Maximum new tokens of a sequence.")
@click.option(
    "--timeout",
    metavar="S",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    help="Time limit of a request, in seconds.",
)
@click.option(
    "--drain",
    metavar="S",
    type=click.IntRange(min=0),
    default=30,
    show_default=True,
    help="Seconds that running requests have to finish after SIGTERM or Ctrl-C.",
)
@click.option(
    "--allow-origin",
    metavar="ORIGIN",
    multiple=True,
    help="Origin whose web pages may call the API from a browser, e.g. https://example.org; *: all. Repeatable.",
)
@click.option(
    "--root-path",
    metavar="PATH",
    default="",
    help="Path of the server behind a reverse proxy, e.g. /llm. The proxy may remove it from the path or keep it.",
)
@click.option(
    "--tool-parser",
    metavar="auto|none|NAME",
    default="auto",
    show_default=True,
    help="Parser of tool calls in replies: hermes, qwen3_coder, nemotron_json, llama3_json or mistral. auto: the one "
    "of the chat template.",
)
@click.option(
    "--reasoning-parser",
    metavar="auto|none|NAME",
    default="auto",
    show_default=True,
    help="Parser of reasoning in replies: think, for text between <think> and </think>. auto: if the chat template "
    "has these tags.",
)
@click.option(
    "--strict-fields",
    is_flag=True,
    help="Refuse fields of requests without effect on the text, such as store, like unknown fields.",
)
@click.option(
    "--chat-template",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Jinja template that turns a chat into a prompt.  [default: the one of the tokenizer]",
)
@click.option("--log-prompts", is_flag=True, help="Also write prompts to the log.")
@click.option(
    "--generation-config",
    metavar="none|PATH",
    help="Sampling defaults of requests. PATH: a generation_config.json or its directory; none: those of the OpenAI "
    "API.  [default: the generation_config.json of the model]",
)
@models.context_device_option
@models.denoiser_device_option
@models.deterministic_option
@models.dtype_option
@models.quantization_option
@models.threads_option
@click.option(
    "--replicas",
    metavar="N",
    type=click.IntRange(min=1),
    help="Serve N replicas, each with the model and an engine, with Ray Serve on a cluster: that of RAY_ADDRESS, else "
    "one of this machine. Needs the extra ray.",
)
def serve(host: str, port: int, drain: int, replicas: int | None, **options: Any) -> None:
    """Serve a model over HTTP: /v1/completions, /v1/chat/completions, and a page at / that shows the decoding.

    The model has two towers, or is an autoregressive model, which is served as a context tower alone.

    By default only this machine can reach the server; see --host. The first SIGTERM or Ctrl-C lets running requests
    finish, the second stops at once.
    """
    try:
        importlib.import_module("twotower.server.uvicorn_server")
    except ImportError as error:
        raise ArgumentError(f"serving needs {error.name}; install it: {install_command('serve')}") from None
    from twotower.cli.serve_checks import check_free, is_loopback
    from twotower.server.options import ServiceOptions

    given = ServiceOptions(**options)
    door = given.check()
    address = Address(host=host, port=port, drain=drain)
    if replicas is not None and port == 0:
        raise ArgumentError("--port 0 does not go with --replicas, because Ray Serve does not choose a port; name one")
    check_free(host, port)
    if not door.keys and not is_loopback(host):
        click.echo(
            f"Warning: other machines can reach {host} without an API key; set --api-keys to require one.", err=True
        )
    if replicas is None:
        serve_here(given, door, address)
    else:
        serve_replicas(given, door, address, replicas)


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a server listens. drain: seconds that running requests have to finish."""

    host: str
    port: int
    drain: int


def serve_here(options: ServiceOptions, door: Door, address: Address) -> None:
    """Loads the model and serves it until a signal.

    Raises:
        TwoTowerError: An option or the model is invalid.
    """
    from twotower.server.building import NO_TOKENIZER, build_service
    from twotower.server.uvicorn_server import serve_until_signal

    model, source = models.load_text_model(
        options.model,
        NO_TOKENIZER,
        dtype=options.dtype,
        quantization=options.quantization,
        context_device=options.context_device,
        denoiser_device=options.denoiser_device,
        threads=options.threads,
        one_tower=True,
    )
    service = build_service(options, door, model, source, lambda text: click.echo(text, err=True), options.model)
    mib = service.engine.stats.state_bytes / 2**20

    def listening(url: str) -> None:
        capacity = f"{options.rows} sequences at once, {mib:,.0f} MiB of caches and states"
        click.echo(_greeting(service.settings.name, url, door.root_path, capacity), err=True)

    serve_until_signal(service, address.host, address.port, address.drain, listening)


def serve_replicas(options: ServiceOptions, door: Door, address: Address, replicas: int) -> None:
    """Serves replicas with Ray Serve until a signal.

    Raises:
        TwoTowerError: Ray is not installed, the cluster has no room, or a replica cannot start.
    """
    from twotower.model_loading import source_of
    from twotower.ray.serving import run_replicas

    name = options.name[0] if options.name else Path(source_of(options.model)).name

    def listening(url: str) -> None:
        capacity = f"{replicas} {'replica' if replicas == 1 else 'replicas'} of {options.rows} sequences at once"
        click.echo(_greeting(name, url, door.root_path, capacity), err=True)

    run_replicas(options, door, replicas, address.host, address.port, address.drain, listening)


def _greeting(name: str, url: str, root_path: str, capacity: str) -> str:
    return f"{name} at {url}: page at {root_path}/, API at {root_path}/v1; {capacity}"
