"""The fields of a config.json whose denoiser is not a full tower, validated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from twotower.errors import ConfigError

FORMAT = 1  # of checkpoints whose denoiser is not a full tower; a reader refuses newer ones
NAMES = ("adapters", "format")


@dataclass(frozen=True)
class AdapterConfig:
    """The denoiser is the context tower with adapters of this rank (`model.adapters`)."""

    rank: int

    @classmethod
    def of(cls, value: object) -> AdapterConfig:
        """The value of `adapters` in config.json.

        Raises:
            ConfigError: it is not an object with a rank, or has other keys.
        """
        if not isinstance(value, dict) or value.keys() != {"rank"}:
            raise ConfigError(f'config: adapters is {value!r}; it must be an object such as {{"rank": 32}}')
        rank = value["rank"]
        if type(rank) is not int or rank < 1:
            raise ConfigError(f"config: adapters.rank is {rank!r}; it must be a positive integer")
        return cls(rank)


def check_format(value: object) -> None:
    """Raises ConfigError if a checkpoint has a format that this version does not know. None: no such checkpoint."""
    if value is not None and (type(value) is not int or not 1 <= value <= FORMAT):
        raise ConfigError(f"config: format is {value!r}; this version reads up to {FORMAT}, so update twotower")


def refuse_denoiser_fields(fields: Mapping[str, object], model_type: str, needed: str) -> None:
    """Raises ConfigError if a config.json of another model_type than the needed one has such fields."""
    for name in NAMES:
        if fields.get(name) is not None:
            raise ConfigError(f"config: {name} needs model_type {needed!r}, and it is {model_type!r}")
