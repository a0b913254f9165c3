"""The fields of a config.json that say what its denoiser is, validated.

Absent fields mean the denoiser of the released checkpoints. Only the fields that differ from it are written, with a
`format` number, so that a reader refuses a denoiser that it does not know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from twotower.denoiser_shape import FeedForward, layers_of
from twotower.errors import ConfigError
from twotower.json_text import JsonObject

AdapterGate = Literal["masks", "everywhere"]
BlockAttention = Literal["full", "prefix_causal"]
GATES: tuple[AdapterGate, ...] = get_args(AdapterGate)
BLOCK_ATTENTIONS: tuple[BlockAttention, ...] = get_args(BlockAttention)
FORMAT = 1  # of checkpoints whose denoiser is not that of the released ones; a reader refuses newer formats


@dataclass(frozen=True)
class AdapterConfig:
    """The denoiser is the context tower with adapters of this rank (`model.adapters`).

    gate: where they act: from the first mask of a block on, or at every position of a block.
    """

    rank: int
    gate: AdapterGate = "masks"

    @classmethod
    def of(cls, value: object) -> AdapterConfig:
        """The value of `adapters` in config.json.

        Raises:
            ConfigError: it is not an object with a rank, or has other keys or values.
        """
        if not isinstance(value, dict) or not {"rank"} <= value.keys() <= {"rank", "gate"}:
            raise ConfigError(
                f'config: adapters is {value!r}; it must be an object such as {{"rank": 32, "gate": "masks"}}'
            )
        rank, gate = _rank("adapters", value["rank"]), value.get("gate", cls.gate)
        if gate not in GATES:
            raise ConfigError(f"config: adapters.gate is {gate!r}; it must be one of {', '.join(GATES)}")
        return cls(rank, cast(AdapterGate, gate))


@dataclass(frozen=True)
class DraftHeadConfig:
    """The denoiser has a draft head of this rank (`model.draft_head`)."""

    rank: int

    @classmethod
    def of(cls, value: object) -> DraftHeadConfig:
        """The value of `draft_head` in config.json.

        Raises:
            ConfigError: it is not an object with a rank, or has other keys.
        """
        if not isinstance(value, dict) or value.keys() != {"rank"}:
            raise ConfigError(f'config: draft_head is {value!r}; it must be an object such as {{"rank": 64}}')
        return cls(_rank("draft_head", value["rank"]))


@dataclass(frozen=True)
class DenoiserConfig:
    """What the denoiser of a checkpoint is. The defaults are the released denoiser: a second full tower.

    prediction_shift: the output at an input predicts the token so many positions later (`decoding.block_rule`).
    block_attention: full: every position of a block attends to the whole block. prefix_causal: positions before the
    first mask attend only to earlier ones and themselves. first_from_ar: in diffusion the AR model chooses the
    first token of each block. adapters: the denoiser is the context tower with adapters. draft_head: the tokens of
    a pass are drawn with a draft head. denoiser_layers: the numbers of the autoregressive model's layers that a
    denoiser tower has a counterpart for; None: all. denoiser_feed_forward: what stands in the place of its MoE
    layers; None: the same.
    """

    prediction_shift: int = 0
    block_attention: BlockAttention = "full"
    first_from_ar: bool = False
    adapters: AdapterConfig | None = None
    draft_head: DraftHeadConfig | None = None
    denoiser_layers: tuple[int, ...] | None = None
    denoiser_feed_forward: FeedForward | None = None

    def __post_init__(self) -> None:
        if type(self.prediction_shift) is not int or self.prediction_shift not in (0, 1):
            raise ConfigError(f"config: prediction_shift is {self.prediction_shift!r}; it must be 0 or 1")
        if self.block_attention not in BLOCK_ATTENTIONS:
            raise ConfigError(
                f"config: block_attention is {self.block_attention!r}; it must be one of {', '.join(BLOCK_ATTENTIONS)}"
            )
        if type(self.first_from_ar) is not bool:
            raise ConfigError(f"config: first_from_ar is {self.first_from_ar!r}; it must be true or false")
        if self.first_from_ar and self.prediction_shift:
            raise ConfigError(
                "config: first_from_ar needs prediction_shift 0; with 1, AR chooses the token after each block anyway"
            )
        if self.adapters is not None:
            self._check_gate(self.adapters.gate)

    @property
    def acts_at_masks(self) -> bool:
        """Whether the denoiser is adapters that act from the first mask of a block on."""
        return self.adapters is not None and self.adapters.gate == "masks"

    def _check_gate(self, gate: AdapterGate) -> None:
        if gate == "masks" and (self.prediction_shift != 1 or self.block_attention != "prefix_causal"):
            raise ConfigError(
                'config: adapters with gate "masks" need prediction_shift 1 and block_attention "prefix_causal", not '
                f"{self.prediction_shift} and {self.block_attention!r}"
            )
        if gate == "everywhere" and self.block_attention != "full":
            raise ConfigError(
                f'config: adapters with gate "everywhere" need block_attention "full", not {self.block_attention!r}'
            )

    @classmethod
    def with_adapters(cls, rank: int, gate: AdapterGate = "masks") -> DenoiserConfig:
        """Adapters with the usual choices for their gate."""
        if gate == "masks":
            return cls(prediction_shift=1, block_attention="prefix_causal", adapters=AdapterConfig(rank, gate))
        return cls(adapters=AdapterConfig(rank, gate))

    @classmethod
    def of(cls, fields: Mapping[str, object]) -> DenoiserConfig:
        """The fields of a config.json with these names (`NAMES`).

        Raises:
            ConfigError: a value is not allowed, or the format is newer than this version.
        """
        check_format(fields.get("format"))
        given = {name: value for name, value in fields.items() if value is not None}
        adapters, head = given.get("adapters"), given.get("draft_head")
        layers, feed_forward = (given.get(name) for name in ("denoiser_layers", "denoiser_feed_forward"))
        found = cls(
            prediction_shift=cast(int, given.get("prediction_shift", cls.prediction_shift)),
            block_attention=cast(BlockAttention, given.get("block_attention", cls.block_attention)),
            first_from_ar=cast(bool, given.get("first_from_ar", cls.first_from_ar)),
            adapters=None if adapters is None else AdapterConfig.of(adapters),
            draft_head=None if head is None else DraftHeadConfig.of(head),
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
SEVERAL = ("denoisers", "denoiser_for")  # the fields of several denoisers (`named_denoisers`)


def refuse_denoiser_fields(fields: Mapping[str, object], model_type: str, needed: str) -> None:
    """Raises ConfigError if a config.json of another model_type than the needed one has such fields."""
    for name in (*NAMES, *SEVERAL):
        if fields.get(name) is not None:
            raise ConfigError(f"config: {name} needs model_type {needed!r}, and it is {model_type!r}")


def _rank(name: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise ConfigError(f"config: {name}.rank is {value!r}; it must be a positive integer")
    return value


def check_format(value: object, newest: int = FORMAT) -> None:
    """Raises ConfigError if this version does not know the format. None: a released denoiser."""
    if value is not None and (type(value) is not int or not 1 <= value <= newest):
        raise ConfigError(f"config: format is {value!r}; this version reads up to {newest}, so update twotower")
