"""`twotower serve`: an HTTP server with the OpenAI endpoints and a web page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from twotower import model_loading
from twotower.cli import model_options as models
from twotower.errors import ArgumentError, install_command

if TYPE_CHECKING:
    from twotower.engine import LLM
    from twotower.server.settings import Limits

DEFAULT_LENGTH = 8192  # limit of the default --length: the cache of a window of a million tokens is too large


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
def serve(**options: Any) -> None:
    """Serve a model over HTTP: /v1/completions, /v1/chat/completions, and a page at / that shows the decoding.

    The model has two towers, or is an autoregressive model, which is served as a context tower alone.

    By default only this machine can reach the server; see --host. The first SIGTERM or Ctrl-C lets running requests
    finish, the second stops at once.
    """
    start_server(ServeOptions(**options))


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The options of a command line, after the checks of click."""

    model: str | None
    host: str
    port: int
    name: tuple[str, ...]
    setting: str | None
    rows: int
    length: int | None
    block_size: int
    memory: float | None
    queue: int
    api_keys: Path | None
    per_key: int | None
    max_prompt: int | None
    max_tokens: int | None
    timeout: float
    drain: int
    log_prompts: bool
    strict_fields: bool
    chat_template: Path | None
    allow_origin: tuple[str, ...]
    root_path: str
    tool_parser: str
    reasoning_parser: str
    generation_config: str | None
    context_device: str | None
    denoiser_device: str | None
    deterministic: bool
    dtype: str
    quantization: str | None
    threads: int | None

    def limits(self) -> Limits:
        from twotower.server.settings import Limits

        return Limits(
            queue=self.queue,
            per_key=self.per_key,
            prompt_tokens=self.max_prompt,
            output_tokens=self.max_tokens,
            request_seconds=self.timeout,
        )


def start_server(options: ServeOptions) -> None:
    """Loads the model and serves it until a signal.

    Raises:
        TwoTowerError: An option or the model is invalid. Most errors are found before weights are read.
    """
    try:
        from twotower.server.uvicorn_server import serve_until_signal
    except ImportError as error:
        raise ArgumentError(f"serving needs {error.name}; install it: {install_command('serve')}") from None
    from twotower.cli.serve_checks import check_free, is_loopback, sampling_defaults
    from twotower.decoding.params import GenerationParams
    from twotower.engine import AsyncLLM
    from twotower.engine.towers import denoiser_name
    from twotower.server.parsers.selection import check_names
    from twotower.server.service import Service
    from twotower.server.settings import ServerSettings, check_origin, check_root_path, read_keys

    for option, given in (("--timeout", options.timeout), ("--memory", options.memory)):
        if given is not None and not math.isfinite(given):
            raise ArgumentError(f"{option} is {given}; it must be a finite number")
    models.setting_values(options.setting or "ar", options.deterministic)  # errors before weights are read
    check_names(options.tool_parser, options.reasoning_parser)
    keys = read_keys(options.api_keys)
    origins, root_path = tuple(map(check_origin, options.allow_origin)), check_root_path(options.root_path)
    if options.per_key is not None and not keys:
        raise ArgumentError("--per-key needs API keys; set --api-keys or TWOTOWER_API_KEYS, or omit it")
    check_free(options.host, options.port)
    source = model_loading.source_of(options.model)
    engine = _engine(options, source)
    sampling = sampling_defaults(engine.model, options.generation_config)
    names = options.name or (Path(source).name,)
    default = "verified" if engine.model.has_denoiser else "ar"
    decoding = models.setting_values(options.setting or default, options.deterministic)
    denoiser_name(engine.model, GenerationParams.from_mapping(decoding))  # raises if the setting names an unknown one
    settings = ServerSettings(
        name=names[0],
        decoding=decoding,
        sampling=sampling,
        limits=options.limits(),
        api_keys=keys,
        log_prompts=options.log_prompts,
        strict_fields=options.strict_fields,
        more_names=names[1:],
        aliases=(options.model,) if options.model else (),
        allowed_origins=origins,
        root_path=root_path,
        tool_parser=options.tool_parser,
        reasoning_parser=options.reasoning_parser,
    )
    if not keys and not is_loopback(options.host):
        click.echo(
            f"Warning: other machines can reach {options.host} without an API key; set --api-keys to require one.",
            err=True,
        )

    mib = engine.stats().state_bytes / 2**20

    def listening(address: str) -> None:
        capacity = f"{options.rows} sequences at once, {mib:,.0f} MiB of caches and states"
        click.echo(f"{settings.name} at {address}: page at {root_path}/, API at {root_path}/v1; {capacity}", err=True)

    serve_until_signal(Service(AsyncLLM(engine), settings), options.host, options.port, options.drain, listening)


def _engine(options: ServeOptions, source: Path | str) -> LLM:
    """Loads the model and builds its engine."""
    from twotower.cli.serve_checks import use_chat_template
    from twotower.engine import LLM

    model, _ = models.load_text_model(
        source,
        "the server cannot encode prompts; put that file into the directory",
        dtype=options.dtype,
        quantization=options.quantization,
        context_device=options.context_device,
        denoiser_device=options.denoiser_device,
        threads=options.threads,
        one_tower=True,
    )
    window = model.spec.max_position_embeddings
    llm = LLM(
        model,
        rows=options.rows,
        length=min(window, DEFAULT_LENGTH) if options.length is None else options.length,
        block_size=options.block_size,
        memory=None if options.memory is None else int(options.memory * 2**30),
    )
    use_chat_template(model, options.chat_template)
    if not getattr(model.tokenizer, "chat_template", None):
        click.echo("Note: the model has no chat template, so a chat is written as lines of `Role: text`.", err=True)
    return llm
