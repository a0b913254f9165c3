"""The configuration of a two-tower model: its `config.json`, validated.

`TwoTowerConfig` describes a model with a Nemotron-H backbone, in the released format. `GenericTwoTowerConfig` describes
a model with any other backbone, whose own config.json it holds. Both keep all keys of the file, known or not.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from twotower.backbone_config import autoregressive_config, plain_numbers, reason
from twotower.denoiser_fields import NAMES, SEVERAL, DenoiserConfig, refuse_denoiser_fields
from twotower.errors import ConfigError, init_command
from twotower.json_text import JsonObject
from twotower.named_denoisers import NamedDenoisers
from twotower.nemotron_h_fields import NemotronHFields, layer_kinds

ARCHITECTURE = "NemotronHTwoTowerForCausalLM"
MODEL_TYPE = "nemotron_h"
GENERIC_ARCHITECTURE = "TwoTowerForCausalLM"
GENERIC_MODEL_TYPE = "two_tower"
MASK_TOKEN_ID = 3  # by convention: released configs carry no mask_token_id

_LAYER_FIELDS = {field.name for field in dataclasses.fields(NemotronHFields)}
_DTYPES = ("bfloat16", "float16", "float32", "float64")
# Other values mean an architecture that this package does not implement.
_ONLY_SUPPORTED: dict[str, tuple[object, ...]] = {
    "mamba_hidden_act": ("silu",),
    "mlp_hidden_act": ("relu2",),
    "sliding_window": (None,),
    "tie_word_embeddings": (False,),
    "rope_scaling": (None,),  # the attention has no position embedding
}


def read_object(file: Path, remedy: str) -> JsonObject:
    """The object of a config.json, unchanged.

    remedy: what to do if the file does not exist, for the message.

    Raises:
        ConfigError: the file does not exist, or is not a JSON object.
    """
    try:
        raw = json.loads(
            file.read_text(encoding="utf-8")
        )  # Python's parser accepts the `Infinity` of the released file
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; {remedy}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: contains a {type(raw).__name__}; it must be a JSON object")
    return raw


@contextmanager
def errors_of(file: Path) -> Iterator[None]:
    """Puts the name of a config.json before the text of a ConfigError that a `with` block raises."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


class TwoTowerConfig(PretrainedConfig):
    """The configuration of a two-tower checkpoint, with the released `model_type`, `nemotron_h`.

    Keyword arguments are the keys of `config.json`. Unknown keys are kept and written back.

    Raises:
        ConfigError: a value is not allowed; the message names field, value and remedy.
    """

    model_type = MODEL_TYPE
    _kept: JsonObject

    def __init__(self, **kwargs: Any) -> None:
        own = {name: kwargs.pop(name) for name in list(kwargs) if name in _LAYER_FIELDS}
        own |= layer_kinds(own, kwargs)
        own.setdefault("hidden_size", 4096)  # transformers constructs configurations without arguments
        own.setdefault("vocab_size", 131072)
        own["time_step_limit"] = _limits(own.get("time_step_limit", (0.0, math.inf)))
        if own.get("num_key_value_heads", 0) is None:
            own["num_key_value_heads"] = own.get("num_attention_heads", NemotronHFields.num_attention_heads)
        for name, allowed in _ONLY_SUPPORTED.items():
            if kwargs.get(name, allowed[0]) not in allowed:
                raise ConfigError(f"config: {name} is {kwargs[name]!r}; only {allowed[0]!r} is supported")
        for name, value in dataclasses.asdict(NemotronHFields(**own)).items():
            setattr(self, name, value)
        self.mask_token_id: int | None = _mask_token(kwargs.pop("mask_token_id", None), own["vocab_size"])
        refuse_denoiser_fields(kwargs, MODEL_TYPE, GENERIC_MODEL_TYPE)
        _use_dtype(kwargs)
        kwargs.setdefault("tie_word_embeddings", False)
        kwargs.setdefault("architectures", [ARCHITECTURE])
        _check_kinds(kwargs)
        _construct(self, kwargs)

    @property
    def layer_fields(self) -> NemotronHFields:
        """The validated fields of the layers."""
        values = {name: getattr(self, name) for name in _LAYER_FIELDS}
        values["time_step_limit"] = _limits(self.time_step_limit)
        return NemotronHFields(**values)

    @property
    def denoiser(self) -> DenoiserConfig:
        """What the denoiser is. Raises ConfigError if there are several."""
        return DenoiserConfig()

    @property
    def denoisers(self) -> NamedDenoisers | None:
        """The denoisers by name, if there are several."""
        return None

    @property
    def stored_pattern(self) -> str | None:
        """The kinds of the layers as the file spells them, to compare with the weights; None if it does not."""
        pattern: str = self.hybrid_override_pattern
        return pattern

    @property
    def num_hidden_layers(self) -> int:
        """The number of layers, which is the length of the pattern."""
        return len(self.hybrid_override_pattern)

    @property
    def mask_token(self) -> int:
        """The id of the mask token: `mask_token_id` of the file, else 3 by convention."""
        return MASK_TOKEN_ID if self.mask_token_id is None else self.mask_token_id

    def to_dict(self) -> JsonObject:
        """The keys of `config.json`."""
        out = super().to_dict()
        out |= out.pop("_kept", {})
        out |= {"num_hidden_layers": self.num_hidden_layers, "time_step_limit": list(self.time_step_limit)}
        if out.get("mask_token_id") is None:
            out.pop("mask_token_id", None)
        return out

    @classmethod
    def of(cls, config: PretrainedConfig) -> TwoTowerConfig:
        """The configuration itself, or a conversion of transformers' class."""
        if isinstance(config, TwoTowerConfig):
            return config
        return TwoTowerConfig(**{name: value for name, value in config.to_dict().items() if name != "model_type"})

    @classmethod
    def read(cls, path: str | Path) -> TwoTowerConfig:
        """Reads a `config.json`, or that of a directory.

        Raises:
            ConfigError: the file does not exist, is not JSON, or has a value that is not allowed.
        """
        file = Path(path)
        file = file / "config.json" if file.is_dir() else file
        raw = read_object(file, "give a checkpoint directory or its config.json")
        kind = raw.pop("model_type", MODEL_TYPE)
        if kind not in (MODEL_TYPE, GENERIC_MODEL_TYPE):
            raise ConfigError(
                f"{file}: model_type is {kind!r}; a two-tower model has {MODEL_TYPE!r} or {GENERIC_MODEL_TYPE!r}. "
                f"Make one of an autoregressive model: {init_command(file.parent)}"
            )
        if kind == MODEL_TYPE and not (raw.keys() & {"hybrid_override_pattern", "layers_block_type", "layer_types"}):
            raise ConfigError(f"{file}: has no hybrid_override_pattern, so the kinds of its layers are unknown")
        with errors_of(file):
            if kind == GENERIC_MODEL_TYPE and raw.get("backbone") is None:
                raise ConfigError("config: backbone is missing; it must be the config.json of the autoregressive model")
            if kind == GENERIC_MODEL_TYPE and raw.get("mask_token_id") is None:
                raise ConfigError("config: mask_token_id is missing; give the id of the mask token")
            return (GenericTwoTowerConfig if kind == GENERIC_MODEL_TYPE else TwoTowerConfig)(**raw)


class GenericTwoTowerConfig(TwoTowerConfig):
    """The configuration of a two-tower checkpoint with any backbone: `model_type` is `two_tower`.

    backbone: the config.json of the autoregressive model, verbatim. mask_token_id: None before it is chosen.
    block_size: the block size that the denoiser was trained with, if it is known. Further keys say what the denoiser
    is (`DenoiserConfig`), or what several are (`NamedDenoisers`).
    """

    model_type = GENERIC_MODEL_TYPE
    _denoiser: DenoiserConfig
    _denoisers: NamedDenoisers | None

    def __init__(
        self,
        backbone: JsonObject | None = None,
        mask_token_id: int | None = None,
        block_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        # transformers constructs configurations without arguments.
        self.backbone: JsonObject = {"model_type": "llama"} if backbone is None else backbone
        if not isinstance(self.backbone, dict):
            raise ConfigError(
                f"config: backbone is {backbone!r}; it must be the config.json of the autoregressive model"
            )
        if block_size is not None and (not isinstance(block_size, int) or block_size < 1):
            raise ConfigError(f"config: block_size is {block_size!r}; it must be a positive integer")
        self.block_size = block_size
        fields = {name: kwargs.pop(name) for name in (*NAMES, *SEVERAL) if name in kwargs}
        self._denoisers = NamedDenoisers.of(fields)
        if self._denoisers is not None and block_size is not None:
            raise ConfigError("config: block_size stands beside denoisers; move it to the denoiser that it describes")
        self._denoiser = DenoiserConfig() if self._denoisers is not None else DenoiserConfig.of(fields)
        text = self.autoregressive
        self.vocab_size, self.hidden_size = text.vocab_size, text.hidden_size
        self.max_position_embeddings = getattr(text, "max_position_embeddings", None)  # Mamba-2 has no limit
        self.mask_token_id = _mask_token(mask_token_id, text.vocab_size)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(text, name, None))
        _use_dtype(kwargs)
        kwargs["tie_word_embeddings"] = bool(text.tie_word_embeddings)
        kwargs.setdefault("architectures", [GENERIC_ARCHITECTURE])
        _construct(self, kwargs)

    @property
    def autoregressive(self) -> PretrainedConfig:
        """transformers' configuration of the backbone, of its text model if the backbone has several parts.

        That of Nemotron-H is a `TwoTowerConfig`.

        Raises:
            ConfigError: transformers does not know the model_type, or refuses a value.
        """
        if self.backbone.get("model_type") == MODEL_TYPE:
            return TwoTowerConfig(**{name: value for name, value in self.backbone.items() if name != "model_type"})
        return autoregressive_config(self.backbone)

    @property
    def denoiser(self) -> DenoiserConfig:
        if self._denoisers is not None:
            raise self._denoisers.ambiguous()
        return self._denoiser

    @property
    def denoisers(self) -> NamedDenoisers | None:
        return self._denoisers

    def with_denoiser(self, name: str) -> GenericTwoTowerConfig:
        """The configuration with one of several denoisers alone. Raises ArgumentError if there is no such denoiser."""
        assert self._denoisers is not None
        own = self._denoisers.by_name[self._denoisers.check_known(name)]
        values = {key: value for key, value in self.to_dict().items() if key not in (*SEVERAL, "format", "model_type")}
        return GenericTwoTowerConfig(**values | {"block_size": own.block_size} | own.choices.to_json())

    @property
    def layer_fields(self) -> NemotronHFields:
        raise AssertionError("the backbone is not Nemotron-H")

    @property
    def stored_pattern(self) -> str | None:
        return None

    @property
    def num_hidden_layers(self) -> int:
        """The number of layers of the autoregressive model."""
        return int(self.autoregressive.num_hidden_layers)

    def to_dict(self) -> JsonObject:
        """The keys of `config.json`."""
        out = PretrainedConfig.to_dict(self)
        out |= out.pop("_kept", {})
        for name in ("vocab_size", "hidden_size", "max_position_embeddings", "tie_word_embeddings"):
            out.pop(name, None)  # the backbone has them
        for name in ("_denoiser", "_denoisers"):
            out.pop(name, None)
        return out | (self._denoiser if self._denoisers is None else self._denoisers).to_json()


def _use_dtype(kwargs: JsonObject) -> None:
    """Moves the older key `torch_dtype` to `dtype`, and checks its value."""
    older_name = kwargs.pop("torch_dtype", None)
    kwargs["dtype"] = kwargs.get("dtype") or older_name
    if isinstance(kwargs.get("dtype"), str) and kwargs["dtype"] not in _DTYPES:
        raise ConfigError(f"config: torch_dtype is {kwargs['dtype']!r}; it must be one of {', '.join(_DTYPES)}")


def _construct(config: TwoTowerConfig, kwargs: JsonObject) -> None:
    """Runs transformers' constructor, and keeps the keys that it drops."""
    try:
        PretrainedConfig.__init__(config, **kwargs)
    except Exception as error:  # transformers checks its own keys, and raises many types
        raise ConfigError(f"config: transformers cannot use a value ({reason(error)}); correct or remove it") from None
    # transformers drops keys that are also generation settings (`use_cache`); here they are kept.
    config._kept = {k: v for k, v in kwargs.items() if not (hasattr(config, k) or hasattr(config, f"_{k}"))}


def _check_kinds(kwargs: JsonObject) -> None:
    """Checks keys of transformers whose values this package reads."""
    if not isinstance(kwargs["architectures"], list | tuple | None):
        raise ConfigError(f"config: architectures is {kwargs['architectures']!r}; it must be a list of names")
    rope = kwargs.get("rope_parameters")
    if rope and (not isinstance(rope, dict) or rope.get("rope_type", "default") != "default"):
        raise ConfigError(
            f"config: rope_parameters is {rope!r}; the attention has no position embedding, so remove the key"
        )


def _limits(value: object) -> object:
    """time_step_limit from JSON, where infinity is `Infinity` or an object of transformers."""
    value = plain_numbers(value)
    if not isinstance(value, list | tuple):
        return value
    return tuple(float(x) if isinstance(x, int | float) or x == "Infinity" else x for x in value)


def _mask_token(value: object, vocab_size: int) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
        raise ConfigError(f"config: mask_token_id is {value!r}; it must be a token id from 0 to {vocab_size - 1}")
    return value
