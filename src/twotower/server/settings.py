"""Settings of a server."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from twotower import options
from twotower.errors import ArgumentError
from twotower.server.parsers.selection import check_names

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of requests. None: no limit, or the limit of the engine."""

    queue: int = 256  # choices that wait
    per_key: int | None = None  # choices of one API key that run or wait
    prompt_tokens: int | None = None
    output_tokens: int | None = None  # of one choice
    choices: int = 64  # of one request
    request_seconds: float | None = 600.0
    body_bytes: int = 4 * 2**20  # after decompression
    all_bodies_bytes: int = 64 * 2**20  # of all requests whose response is not complete
    body_seconds: float = 30.0  # in which a body must arrive


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of a server.

    name: name of the model for clients.
    decoding: defaults for `GenerationParams.of`, including the mode.
    sampling: defaults of every mode, from `generation_config.json`; `decoding` overrides them.
    api_keys: empty if requests need no key.
    log_prompts: whether the log contains prompts. more_names: further names of the model, which `/v1/models` lists too.
    aliases: names that it does not list, such as its hub id.
    allowed_origins: origins whose pages may call the server from a browser; "*" means all.
    root_path: path of the server behind a reverse proxy, such as /llm; empty without one.
    strict_fields: whether fields without effect on the text are refused like unknown fields.
    tool_parser, reasoning_parser: names of the parsers of replies (`parsers.selection`); auto: by the chat template.
    """

    name: str
    decoding: Mapping[str, object] = field(default_factory=lambda: {"mode": "verified"})
    sampling: Mapping[str, object] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    api_keys: tuple[str, ...] = ()
    log_prompts: bool = False
    more_names: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    root_path: str = ""
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    strict_fields: bool = False

    def __post_init__(self) -> None:
        check_names(self.tool_parser, self.reasoning_parser)


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


def check_origin(origin: str) -> str:
    """Returns an origin of web pages as browsers send it.

    Raises:
        ArgumentError: It is neither "*" nor a scheme, a host and an optional port.
    """
    if origin != "*" and not ORIGIN.fullmatch(origin.lower()):
        raise ArgumentError(
            f"origin {origin!r} is not valid; give scheme, host and port, e.g. https://example.org, or *",
            param="allow_origin",
        )
    return origin.lower()


def check_root_path(path: str) -> str:
    """Returns a path prefix without a slash at its end.

    Raises:
        ArgumentError: The path is not absolute, has other characters than those of a path, or hides the API.
    """
    root = path.rstrip("/")
    if root and (not ROOT_PATH.fullmatch(root) or f"{root}/".startswith("/v1/")):
        raise ArgumentError(
            f"root path {path!r} is not valid; give a path that starts with / and not with /v1, e.g. /llm",
            param="root_path",
        )
    return root
