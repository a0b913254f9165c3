"""The fields of a config.json that say what its denoiser is, validated.

Absent fields mean the denoiser of the released checkpoints. Only the fields that differ from it are written, with a
`format` number, so that a reader refuses a denoiser that it does not know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from twotower.denoiser_shape import FeedForward, layers_of
from twotower.errors import ConfigError
from twotower.json_text import JsonObject

FORMAT = 1  # of checkpoints whose denoiser is not that of the released ones; a reader refuses newer formats


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


@dataclass(frozen=True)
class DenoiserConfig:
    """What the denoiser of a checkpoint is. The defaults are the released denoiser: a second full tower.

    adapters: the denoiser is the context tower with adapters. denoiser_layers: the numbers of the autoregressive
    model's layers that a denoiser tower has a counterpart for; None: all. denoiser_feed_forward: what stands in the
    place of its MoE layers; None: the same MoE layers.
    """

    adapters: AdapterConfig | None = None
    denoiser_layers: tuple[int, ...] | None = None
    denoiser_feed_forward: FeedForward | None = None

    @classmethod
    def of(cls, fields: Mapping[str, object]) -> DenoiserConfig:
        """The fields of a config.json with these names (`NAMES`).

        Raises:
            ConfigError: a value is not allowed, or the format is newer than this version.
        """
        check_format(fields.get("format"))
        adapters = fields.get("adapters")
        layers, feed_forward = (fields.get(name) for name in ("denoiser_layers", "denoiser_feed_forward"))
        found = cls(
            adapters=None if adapters is None else AdapterConfig.of(adapters),
            denoiser_layers=None if layers is None else layers_of(layers),
            denoiser_feed_forward=None if feed_forward is None else FeedForward.of(feed_forward),
        )
        for name in ("denoiser_layers", "denoiser_feed_forward"):
            if found.adapters is not None and getattr(found, name) is not None:
                raise ConfigError(f"config: {name} describes a denoiser tower, and adapters have none; remove one")
        return found

    def to_json(self) -> JsonObject:
        """The fields for a config.json: those that differ from the released denoiser, and the format."""
        default = DenoiserConfig()
        names = [field.name for field in dataclasses.fields(self)]
        values = dataclasses.asdict(self)
        out = {name: values[name] for name in names if getattr(self, name) != getattr(default, name)}
        return {**out, "format": FORMAT} if out else {}


NAMES = (*(field.name for field in dataclasses.fields(DenoiserConfig)), "format")


def refuse_denoiser_fields(fields: Mapping[str, object], model_type: str, needed: str) -> None:
    """Raises ConfigError if a config.json of another model_type than the needed one has such fields."""
    for name in NAMES:
        if fields.get(name) is not None:
            raise ConfigError(f"config: {name} needs model_type {needed!r}, and it is {model_type!r}")


def check_format(value: object) -> None:
    """Raises ConfigError if this version does not know the format. None: a released denoiser."""
    if value is not None and (type(value) is not int or not 1 <= value <= FORMAT):
        raise ConfigError(f"config: format is {value!r}; this version reads up to {FORMAT}, so update twotower")
