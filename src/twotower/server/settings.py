"""What a server is started with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from twotower import options
from twotower.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client may take from the others.

    queue: choices that may wait for a place; per_key: choices of one API key at once, waiting ones included (None: no
    bound); prompt_tokens, output_tokens of one choice (None: what the engine holds); choices of one request;
    request_seconds that a request may take (None: no bound); body_bytes of a
    request, and body_seconds in which it has to arrive.
    """

    queue: int = 256
    per_key: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    choices: int = 64
    request_seconds: float | None = 600.0
    body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """name: what the model is called; decoding: arguments of `GenerationParams.of` where a request says nothing else,
    the mode among them; api_keys (none: everybody may ask); log_prompts: whether logs hold texts."""

    name: str
    decoding: Mapping[str, object] = field(default_factory=lambda: {"mode": "diffusion"})
    limits: Limits = field(default_factory=Limits)
    api_keys: tuple[str, ...] = ()
    log_prompts: bool = False


def read_keys(file: Path | None) -> tuple[str, ...]:
    """API keys, one a line of the file, and those of the option `api_keys`.

    Raises:
        ArgumentError: the file has none, or is no text.
    """
    given = list(options.current().api_keys)
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except UnicodeDecodeError:
            raise ArgumentError(f"{file}: is no text; write one key on each line", param="file") from None
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise ArgumentError(f"{file}: holds no key; write one on each line", param="file")
        given += found
    return tuple(dict.fromkeys(key.strip() for key in given if key.strip()))
