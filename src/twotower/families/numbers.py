"""Checks of numbers in a config.json that transformers accepts, and with which no model computes anything sensible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

from transformers import PretrainedConfig

from twotower.errors import ConfigError
from twotower.families.family import declared

_POSITIVE = ("layer_norm_epsilon", "logits_scaling", "query_pre_attn_scalar", "rms_norm_eps")
_POSITIVE_OR_NULL = ("attn_logit_softcapping", "clip_qkv", "final_logit_softcapping")
_FINITE = (
    "attention_in_multiplier",
    "attention_multiplier",
    "attention_out_multiplier",
    "embedding_multiplier",
    "key_multiplier",
    "lm_head_multiplier",
    "residual_multiplier",
    "ssm_in_multiplier",
    "ssm_out_multiplier",
)
_WHOLE = (
    "mamba_chunk_size",
    "mamba_d_conv",
    "mamba_d_state",
    "mamba_n_groups",
    "mamba_n_heads",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
)
_LISTS = {"mlp_multipliers": 2, "ssm_multipliers": 5}  # how many numbers each has
_ROPE = (
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "high_freq_factor",
    "low_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
)


def check_numbers(config: PretrainedConfig) -> None:
    """Checks the numbers that the configuration class of a family declares, apart from those of RoPE.

    Raises:
        ConfigError: a number is not finite or not positive, a list has another length, or layers lack their window.
    """
    for key in (*_POSITIVE, *_POSITIVE_OR_NULL):
        value = declared(config, key, 1.0)
        if not _positive(value) and not (value is None and key in _POSITIVE_OR_NULL):
            raise ConfigError(f"config: {key} is {value!r}; it must be a positive number")
    for key in _FINITE:
        if not _number(value := declared(config, key, 1.0)):
            raise ConfigError(f"config: {key} is {value!r}; it must be a finite number")
    for key in _WHOLE:
        if not isinstance(count := declared(config, key, 1), int):
            raise ConfigError(f"config: {key} is {count!r}; it must be an integer")
    for key, length in _LISTS.items():
        if not _numbers(values := declared(config, key, [1.0] * length), length):
            raise ConfigError(f"config: {key} is {values!r}; it must be a list of {length} numbers")
    limits = declared(config, "time_step_limit", (0.0, math.inf))
    if not (isinstance(limits, list | tuple) and len(limits) == 2 and all(isinstance(x, int | float) for x in limits)):
        raise ConfigError(f"config: time_step_limit is {limits!r}; it must be a list of two numbers")
    types = declared(config, "layer_types", None) or ()
    if "sliding_attention" in types and declared(config, "sliding_window", 1) is None:
        remedy = (
            "sliding_window is None; give the window, or write 'full_attention'"
            if declared(config, "use_sliding_window", True)
            else "use_sliding_window is false; change one of the two"
        )
        raise ConfigError(f"config: layer_types has 'sliding_attention', but {remedy}")


def check_rope(parameters: dict[str, object], pairs: int) -> None:
    """Checks the parameters of a rotary position embedding that turns `pairs` pairs of each head.

    Raises:
        ConfigError: one is not a positive number, or the factors of LongRoPE are not one for each pair.
    """
    theta = parameters.get("rope_theta")
    if not _positive(theta):
        raise ConfigError(f"config: rope_theta is {theta!r}; it must be a positive number")
    for key in _ROPE:
        if (value := parameters.get(key)) is not None and not _positive(value):
            raise ConfigError(f"config: {key} of rope_parameters is {value!r}; it must be a positive number")
    for key in ("short_factor", "long_factor"):
        values = parameters.get(key)
        if values is not None and not (_numbers(values, pairs) and all(map(_positive, values))):
            raise ConfigError(
                f"config: {key} of rope_parameters is {values!r}; it must be a list of {pairs} positive numbers, one "
                "for each turned pair of a head"
            )


def check_partial(part: object) -> None:
    """Raises ConfigError unless `partial_rotary_factor` is a part of a head."""
    if not _positive(part) or float(part) > 1:
        raise ConfigError(f"config: partial_rotary_factor is {part!r}; it must be above 0 and at most 1")


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: object) -> TypeGuard[float]:
    return _number(value) and value > 0


def _numbers(values: object, count: int) -> TypeGuard[Sequence[float]]:
    return isinstance(values, list | tuple) and len(values) == count and all(map(_number, values))
