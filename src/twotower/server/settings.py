"""Settings of a server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from twotower import options
from twotower.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of requests. None: no limit, or the limit of the engine."""

    queue: int = 256  # choices that wait
    per_key: int | None = None  # choices of one API key that run or wait
    prompt_tokens: int | None = None
    output_tokens: int | None = None  # of one choice
    choices: int = 64  # of one request
    request_seconds: float | None = 600.0
    body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0  # in which a body must arrive


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of a server.

    name: name of the model for clients.
    decoding: defaults for `GenerationParams.of`, including the mode.
    api_keys: empty if requests need no key.
    log_prompts: whether the log contains prompts.
    """

    name: str
    decoding: Mapping[str, object] = field(default_factory=lambda: {"mode": "diffusion"})
    limits: Limits = field(default_factory=Limits)
    api_keys: tuple[str, ...] = ()
    log_prompts: bool = False


def read_keys(file: Path | None) -> tuple[str, ...]:
    """Reads API keys from the option `api_keys` and from a file with one key per line; lines with `#` are comments.

    Raises:
        ArgumentError: The file is not UTF-8 text or has no key.
    """
    given = list(options.current().api_keys)
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except UnicodeDecodeError:
            raise ArgumentError(f"{file} is not UTF-8 text; write one key per line", param="file") from None
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise ArgumentError(f"{file} has no key; write one key per line", param="file")
        given += found
    return tuple(dict.fromkeys(key.strip() for key in given if key.strip()))
