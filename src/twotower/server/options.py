"""The options of a server that depend on neither its address nor its process: one or many replicas have them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from twotower.decoding.presets import parse_setting
from twotower.errors import ArgumentError
from twotower.json_text import JsonObject
from twotower.model_loading import DTYPES, name_on_nodes, source_of
from twotower.quantization import QuantizationPlan
from twotower.server.parsers.selection import check_names
from twotower.server.settings import Limits, check_origin, check_root_path, read_keys

LEAST = {
    "rows": 1,
    "length": 2,
    "block_size": 1,
    "queue": 0,
    "per_key": 1,
    "max_prompt": 1,
    "max_tokens": 1,
    "threads": 1,
}
POSITIVE = ("timeout", "memory")


@dataclass(frozen=True)
class Door:
    """What is checked before weights are read. keys: API keys. origins, root_path: of `ServerSettings`."""

    keys: tuple[str, ...]
    origins: tuple[str, ...]
    root_path: str


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """The options of `twotower serve`, which describes them, without those of the address. memory is in GiB.

    Raises:
        ArgumentError: a value is not allowed.
    """

    model: str | None = None
    name: tuple[str, ...] = ()
    setting: str | None = None
    rows: int = 16
    length: int | None = None
    block_size: int = 16
    memory: float | None = None
    queue: int = 256
    api_keys: Path | None = None
    per_key: int | None = None
    max_prompt: int | None = None
    max_tokens: int | None = None
    timeout: float = 600.0
    log_prompts: bool = False
    strict_fields: bool = False
    chat_template: Path | None = None
    allow_origin: tuple[str, ...] = ()
    root_path: str = ""
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    generation_config: str | None = None
    context_device: str | None = None
    denoiser_device: str | None = None
    deterministic: bool = False
    dtype: str = "auto"
    quantization: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for option, least in LEAST.items():
            count = getattr(self, option)
            if count is not None and count < least:
                raise ArgumentError(f"{_shown(option)} is {count}; give at least {least}", param=option)
        for option in POSITIVE:
            given = getattr(self, option)
            if given is not None and not (given > 0 and math.isfinite(given)):
                raise ArgumentError(f"{_shown(option)} is {given}; it must be a finite number above 0", param=option)
        if self.dtype not in DTYPES:
            raise ArgumentError(f"--dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}", param="dtype")
        if self.quantization is not None:
            QuantizationPlan.parse(self.quantization)

    @classmethod
    def of_text(cls, given: Mapping[str, object]) -> ServiceOptions:
        """Options from `NAME=VALUE` of a command line; several names of a repeatable option are separated by commas.

        Raises:
            ArgumentError: there is no such option, or it does not have this value.
        """
        types = {one.name: str(one.type) for one in dataclasses.fields(cls)}
        values: JsonObject = {}
        for key, value in given.items():
            option = key.replace("-", "_")
            if option not in types:
                known = ", ".join(types)
                raise ArgumentError(f"there is no option {key!r} of a replica; choose one of {known}", param=key)
            try:
                values[option] = READERS[types[option]](value) if isinstance(value, str) else value
            except ValueError:
                raise ArgumentError(f"{key} is {value!r}; its type is {types[option]}", param=key) from None
        return cls(**values)

    def check(self) -> Door:
        """Checks what needs no weights, and reads the API keys.

        Raises:
            ArgumentError: an option is not valid, or a file is missing.
        """
        self.decoding("ar")
        check_names(self.tool_parser, self.reasoning_parser)
        for option, file in (("api_keys", self.api_keys), ("chat_template", self.chat_template)):
            if file is not None and not file.is_file():
                raise ArgumentError(f"{_shown(option)} is {str(file)!r}, which is no file; give a file", param=option)
        keys = read_keys(self.api_keys)
        door = Door(keys, tuple(map(check_origin, self.allow_origin)), check_root_path(self.root_path))
        if self.per_key is not None and not keys:
            raise ArgumentError("--per-key needs API keys; set --api-keys or TWOTOWER_API_KEYS, or omit it")
        return door

    def decoding(self, default: str) -> dict[str, object]:
        """The decoding parameters of requests that name none. default: the mode without `--setting`."""
        values = parse_setting(self.setting or default).values
        return values | ({"deterministic": True} if self.deterministic else {})

    def limits(self) -> Limits:
        return Limits(
            queue=self.queue,
            per_key=self.per_key,
            prompt_tokens=self.max_prompt,
            output_tokens=self.max_tokens,
            request_seconds=self.timeout,
        )

    def for_nodes(self) -> ServiceOptions:
        """The options for a process in another folder or on another machine: paths that exist here are absolute."""
        template = self.chat_template and self.chat_template.absolute()
        config = self.generation_config
        if config not in (None, "none"):
            config = str(Path(str(config)).absolute())
        return dataclasses.replace(
            self, model=name_on_nodes(source_of(self.model)), chat_template=template, generation_config=config
        )


def _shown(option: str) -> str:
    return "--" + option.replace("_", "-")


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError(text)
    return text.lower() in ("true", "1")


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


# By the annotation of a field of `ServiceOptions`.
READERS: dict[str, Callable[[str], object]] = {
    "int": int,
    "int | None": int,
    "float": float,
    "float | None": float,
    "bool": _flag,
    "str": str,
    "str | None": str,
    "Path | None": Path,
    "tuple[str, ...]": _names,
}
