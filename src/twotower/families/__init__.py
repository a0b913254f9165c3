"""The families of autoregressive models that can be the backbone of two towers, one file each.

A family says how its config.json becomes a `TowerSpec`, and where its tensors are on disk. docs/backbones.md shows how
to add one.
"""

from __future__ import annotations

from twotower.config import MODEL_TYPE, GenericTwoTowerConfig, TwoTowerConfig
from twotower.errors import ConfigError
from twotower.families import (
    bamba,
    falcon_h1,
    gemma,
    glm4,
    granite,
    granite_hybrid,
    llama,
    mamba2,
    mixtral,
    nemotron_h,
    olmo,
    olmoe,
    phi3,
    qwen_moe,
    qwen_next,
    smollm3,
)
from twotower.families.family import Family
from twotower.families.numbers import check_numbers
from twotower.families.unsupported import reason
from twotower.specs import TowerSpec

FAMILIES: tuple[Family, ...] = (
    llama.LLAMA,
    llama.MISTRAL,
    llama.QWEN2,
    llama.QWEN3,
    smollm3.FAMILY,
    phi3.FAMILY,
    gemma.GEMMA,
    gemma.GEMMA2,
    gemma.GEMMA3,
    olmo.OLMO2,
    olmo.OLMO3,
    granite.FAMILY,
    glm4.FAMILY,
    mixtral.FAMILY,
    qwen_moe.QWEN2_MOE,
    qwen_moe.QWEN3_MOE,
    olmoe.FAMILY,
    granite_hybrid.FAMILY,
    bamba.FAMILY,
    mamba2.FAMILY,
    falcon_h1.FAMILY,
    qwen_next.QWEN3_NEXT,
    qwen_next.QWEN3_5,
    qwen_next.QWEN3_5_MOE,
)
BY_MODEL_TYPE: dict[str, Family] = {name: family for family in FAMILIES for name in family.model_types}


def family_of(config: TwoTowerConfig) -> Family:
    """The family of the backbone of a two-tower model.

    Raises:
        ConfigError: no family has the backbone's model_type.
    """
    if not isinstance(config, GenericTwoTowerConfig):
        return nemotron_h.FAMILY
    kind = config.autoregressive.model_type
    if kind == MODEL_TYPE:
        return nemotron_h.FAMILY
    if kind not in BY_MODEL_TYPE:
        raise ConfigError(
            f"config: model_type is {kind!r}, and {reason(kind)}; supported are nemotron_h, "
            f"{', '.join(sorted(BY_MODEL_TYPE))}"
        )
    return BY_MODEL_TYPE[kind]


def tower_spec(config: TwoTowerConfig) -> TowerSpec:
    """The layers of a tower of this configuration.

    Raises:
        ConfigError: the backbone has an option that is not supported, or a value that no model can have.
    """
    if isinstance(config, GenericTwoTowerConfig):
        text = config.autoregressive
        if isinstance(text, TwoTowerConfig):
            return nemotron_h.spec_of(text.layer_fields)
        family = family_of(config)
        check_numbers(text)
        try:
            return family.spec(text)
        except ConfigError:
            raise
        except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:  # values that no check names
            raise ConfigError(f"config: values of {text.model_type!r} do not fit together ({error})") from None
    return nemotron_h.spec_of(config.layer_fields)
