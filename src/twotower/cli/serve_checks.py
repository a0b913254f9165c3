"""Parts of `twotower serve`: sampling defaults, the chat template, and the address."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from twotower.errors import ArgumentError
from twotower.tokenizer import require_tokenizer

if TYPE_CHECKING:
    from twotower.engine.towers import Towers


def sampling_defaults(model: Towers, given: str | None) -> dict[str, object]:
    """The sampling defaults of `--generation-config`; its EOS tokens, if it has any, become those of the model.

    Raises:
        TwoTowerError: the file does not exist, or a value is not allowed.
    """
    from twotower.checkpoint.generation_config import FILE, GenerationDefaults
    from twotower.decoding.params import GenerationParams

    if given == "none":
        return {}
    if given is not None:
        read = GenerationDefaults.read(Path(given), model.spec.vocab_size)
        if read.file is None:
            raise ArgumentError(f"--generation-config {given}: the directory has no {FILE}; give a file or none")
        model.generation_defaults = model.generation_defaults.override(read)
    defaults = model.generation_defaults
    sampling = defaults.sampling()
    GenerationParams.from_mapping({"mode": "ar"} | sampling)
    if sampling:
        values = ", ".join(f"{name} {value}" for name, value in sampling.items())
        click.echo(f"Sampling defaults of requests: {values} ({defaults.file}).", err=True)
    if unused := defaults.unused():
        click.echo(f"Note: {defaults.file}: {', '.join(unused)} has no effect here.", err=True)
    return sampling


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_free(host: str, port: int) -> None:
    """Raises ArgumentError if the address is not available. Called before weights are read."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(*found[:3]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[4])
    except OSError as error:
        raise ArgumentError(
            f"cannot listen on {host} port {port} ({error.strerror}); choose another --host or --port"
        ) from None


def use_chat_template(model: Towers, file: Path | None) -> None:
    """Gives the model's tokenizer the chat template of `--chat-template`.

    Raises:
        ArgumentError: The file is not UTF-8 text, or not a Jinja template.
    """
    if file is None:
        return
    import jinja2

    tokenizer = require_tokenizer(model.tokenizer)
    try:
        tokenizer.chat_template = file.read_text(encoding="utf-8")
        with suppress(jinja2.UndefinedError, jinja2.TemplateRuntimeError):  # it may need more than this chat has
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except UnicodeDecodeError:
        raise ArgumentError(f"--chat-template {file} is not UTF-8 text; give a Jinja template") from None
    except jinja2.TemplateSyntaxError as error:
        reason = f"line {error.lineno}: {error.message}"
        raise ArgumentError(f"--chat-template {file} is not a Jinja template ({reason}); correct it") from None
