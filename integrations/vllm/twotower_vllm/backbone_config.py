"""What vLLM reads as the configuration of a two-tower checkpoint: that of its backbone."""

from __future__ import annotations

import copy

from transformers import PretrainedConfig
from transformers.models.nemotron_h import NemotronHConfig

from twotower.config import GENERIC_MODEL_TYPE, MODEL_TYPE, GenericTwoTowerConfig, TwoTowerConfig
from twotower.errors import ConfigError
from twotower.json_text import JsonObject
from twotower.nemotron_h_fields import NemotronHFields
from twotower_vllm.architectures import PREFIX, RELEASED, class_of, family_refusal

SOURCE = "two_tower_source"  # an attribute of the backbone's configuration: the config.json that it comes from


def is_two_tower(raw: JsonObject) -> bool:
    """Whether a config.json is that of a two-tower checkpoint."""
    architectures = raw.get("architectures")
    return raw.get("model_type") == GENERIC_MODEL_TYPE or (
        isinstance(architectures, list) and RELEASED in architectures
    )


def two_tower_config(raw: JsonObject) -> TwoTowerConfig:
    """The configuration of this package from the keys of a config.json. Raises ConfigError as `TwoTowerConfig` does."""
    values = {key: value for key, value in copy.deepcopy(raw).items() if key != "model_type"}
    generic = raw.get("model_type") == GENERIC_MODEL_TYPE
    return GenericTwoTowerConfig(**values) if generic else TwoTowerConfig(**values)


def backbone_of(raw: JsonObject) -> PretrainedConfig:
    """transformers' configuration of the backbone, with the architecture that this package adds to vLLM.

    raw: the keys of the config.json of a two-tower checkpoint.

    Raises:
        ConfigError: a value is not allowed, or vLLM cannot compute the backbone.
    """
    own = two_tower_config(raw)
    if raw.get("quantization_config") is not None:
        raise ConfigError(
            "the weights are stored quantised (quantization_config), under names that vLLM does not read; serve the "
            "original checkpoint, and let vLLM quantise it with --quantization"
        )
    if isinstance(own, GenericTwoTowerConfig):
        config, name = _generic(own)
    else:
        config, name = _nemotron_h(raw), RELEASED
    config.architectures = [name]
    config.dtype = raw.get("torch_dtype") or raw.get("dtype") or config.dtype
    setattr(config, SOURCE, dict(raw))
    return config


def _generic(own: GenericTwoTowerConfig) -> tuple[PretrainedConfig, str]:
    """The configuration of the backbone, and the name of its architecture."""
    text = own.autoregressive
    vllm_class = class_of(text.model_type)
    if vllm_class is None:
        raise ConfigError(family_refusal(text.model_type))
    return (_nemotron_h(own.backbone) if text.model_type == MODEL_TYPE else text), PREFIX + vllm_class


def _nemotron_h(raw: JsonObject) -> PretrainedConfig:
    values = copy.deepcopy(raw)
    for key in ("auto_map", "model_type"):
        values.pop(key, None)
    fields: NemotronHFields = TwoTowerConfig(**copy.deepcopy(values)).layer_fields
    if fields.time_step_limit != (0.0, float("inf")):
        raise ConfigError(
            f"config: time_step_limit is {list(fields.time_step_limit)}; vLLM's Mamba-2 layers have no limits of the "
            "time step, so its texts would be others. `twotower serve` runs this model"
        )
    values["time_step_limit"] = [0.0, float("inf")]
    return NemotronHConfig(**values)
