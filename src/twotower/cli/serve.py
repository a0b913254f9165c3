"""`twotower serve`: the OpenAI endpoints, and a page."""

from __future__ import annotations

import ipaddress
import math
import socket
from pathlib import Path

import click

from twotower import model_loading
from twotower.cli import model_options as models
from twotower.errors import ArgumentError


@click.command()
@models.model_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on. 0.0.0.0: every one.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one.")
@click.option("--name", help="What clients call the model.  [default: its directory's name]")
@click.option(
    "-s", "--setting", default="diffusion", show_default=True, metavar="MODE[:KNOB,NAME=X…]",
    help="How to decode where a request says nothing else, e.g. verified, auto, diffusion:0.8.",
)  # fmt: skip
@click.option("--rows", type=click.IntRange(min=1), default=16, show_default=True, help="Texts at work at once.")
@click.option(
    "--length",
    metavar="N",
    type=click.IntRange(min=2),
    help="Tokens of the longest text with its prompt.  [default: the model's window, at most 8192]",
)
@click.option(
    "--block-size", metavar="N", type=click.IntRange(min=1), default=16, show_default=True, help="The longest block."
)
@click.option(
    "--memory",
    metavar="GIB",
    type=click.FloatRange(min=0, min_open=True),
    help="For the texts' state.  [default: for ROWS of the longest]",
)
@click.option(
    "--queue", metavar="N", type=click.IntRange(min=0), default=256, show_default=True, help="Texts that may wait."
)
@click.option(
    "--api-keys",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="One a line; also TWOTOWER_API_KEYS, with commas.  [default: none is asked for]",
)
@click.option("--per-key", metavar="N", type=click.IntRange(min=1), help="Texts of one key at once.")
@click.option("--max-prompt", metavar="N", type=click.IntRange(min=1), help="Tokens of a prompt, at most.")
@click.option("--max-tokens", metavar="N", type=click.IntRange(min=1), help="New tokens of a text, at most.")
@click.option(
    "--timeout",
    metavar="S",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    help="Seconds that a request may take.",
)
@click.option(
    "--drain",
    metavar="S",
    type=click.IntRange(min=0),
    default=30,
    show_default=True,
    help="Seconds that requests get to end when the server is told to stop.",
)
@click.option("--log-prompts", is_flag=True, help="Write prompts into the log, too.")
@click.option(
    "--context-device", metavar="DEVICE", help="E.g. cpu, cuda:0.  [default: the first CUDA device, else cpu]"
)
@click.option("--denoiser-device", metavar="DEVICE", help="[default: the context's]")
@models.dtype_option
@models.quantization_option
@models.threads_option
def serve(
    model: str | None, host: str, port: int, name: str | None, setting: str, rows: int, length: int | None,
    block_size: int, memory: float | None, queue: int, api_keys: Path | None, per_key: int | None,
    max_prompt: int | None, max_tokens: int | None, timeout: float, drain: int, log_prompts: bool,
    context_device: str | None, denoiser_device: str | None, dtype: str, quantization: str, threads: int | None,
) -> None:  # fmt: skip
    """Serve a model: /v1/completions, /v1/chat/completions, and a page at / to see it think.

    Only this machine can reach it unless --host says otherwise. SIGTERM or Ctrl-C lets requests end; twice stops now.
    """
    from twotower.decoding.presets import parse_setting

    try:
        from twotower.server.run import serve as run
    except ImportError as error:
        raise ArgumentError(f"serving needs {error.name}; install it: pip install 'twotower[serve]'") from None
    from twotower.engine import LLM, AsyncLLM
    from twotower.server.service import Service
    from twotower.server.settings import Limits, Settings, read_keys

    for option, given in (("--timeout", timeout), ("--memory", memory)):
        if given is not None and not math.isfinite(given):
            raise ArgumentError(f"{option} is {given}; it must be a finite number")
    decoding = parse_setting(setting).values
    keys = read_keys(api_keys)
    if per_key is not None and not keys:
        raise ArgumentError("--per-key goes with API keys; give some with --api-keys or TWOTOWER_API_KEYS")
    _check_free(host, port)
    source = model_loading.source_of(model)
    with models.note(f"loading {model_loading.name_of(source)} …"):
        loaded = model_loading.load(
            source, dtype=dtype, quantization=quantization, context_device=context_device,
            denoiser_device=denoiser_device, threads=threads,
        )  # fmt: skip
    model_loading.need_tokenizer(loaded, source, "it can neither read nor write text; put one there")
    window = loaded.config.backbone.max_position_embeddings
    engine = LLM(
        loaded, rows=rows, length=min(window, USUAL_LENGTH) if length is None else length, block_size=block_size,
        memory=None if memory is None else int(memory * 2**30),
    )  # fmt: skip
    limits = Limits(
        queue=queue, per_key=per_key, prompt_tokens=max_prompt, output_tokens=max_tokens, seconds=timeout,
    )  # fmt: skip
    settings = Settings(
        name=name or Path(source).name, decoding=decoding, limits=limits, keys=keys, log_prompts=log_prompts
    )
    if not keys and not _loopback(host):
        click.echo(f"Warning: {host} can be reached from other machines, and no API key is asked for.", err=True)

    mib = engine.stats().state_bytes / 2**20

    def listening(address: str) -> None:
        click.echo(
            f"{settings.name} at {address}: the page at /, the API at /v1; {rows} texts at once in {mib:,.0f} MiB",
            err=True,
        )

    run(Service(AsyncLLM(engine), settings), host, port, drain, listening)


USUAL_LENGTH = 8192  # tokens of a text where nobody says: windows of a million would take all memory at once


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_free(host: str, port: int) -> None:
    """Raises ArgumentError where nobody can listen there: told before any weights are read."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(*found[:3]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[4])
    except OSError as error:
        raise ArgumentError(
            f"cannot listen on {host} port {port} ({error.strerror}); choose another --host or --port"
        ) from None
