"""Rotary position embeddings of a configuration, with the frequencies that transformers computes."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from twotower.backbone_config import quiet_transformers
from twotower.errors import ConfigError
from twotower.families.numbers import check_partial, check_rope
from twotower.specs import RopeSpec

SUPPORTED = ("default", "linear", "llama3", "yarn", "longrope")  # not dynamic: it changes with every token


def rope_spec(
    config: PretrainedConfig,
    head_dim: int,
    layer_type: str | None = None,
    *,
    interleaved: bool = False,
    partial: bool = False,
) -> RopeSpec:
    """The rotary position embedding of a configuration. layer_type: which one, if layers have different ones.

    partial: whether the family reads `partial_rotary_factor`, the part of a head that turns.

    Raises:
        ConfigError: the type of scaling is not supported, or is not where transformers reads it, or the family has no
            `partial_rotary_factor`, or a number is wrong.
    """
    parameters = config.rope_parameters
    if layer_type is not None and layer_type in parameters:
        parameters = parameters[layer_type]
    else:
        layer_type = None
    kind = parameters["rope_type"]
    if kind not in SUPPORTED:
        raise ConfigError(f"config: rope_type is {kind!r}; supported are {', '.join(SUPPORTED)}")
    if kind == "default" and parameters.get("type", kind) != kind:  # transformers reads `type` only in some families
        raise ConfigError(f"config: the type of RoPE scaling is {parameters['type']!r}; write it as rope_type")
    part = parameters.get("partial_rotary_factor", 1.0)
    if part != 1.0 and not partial:
        raise ConfigError(
            f"config: partial_rotary_factor is {part!r}, but heads of {config.model_type!r} turn as a whole; "
            "remove the key"
        )
    check_partial(part)
    width = int(head_dim * part)
    check_rope(parameters, pairs=-(-width // 2))
    if kind != "default":
        return _scaled(config, kind, layer_type, interleaved)
    exponents = torch.arange(0, width, 2, dtype=torch.int64, device="cpu").to(torch.float32) / width
    frequencies = 1.0 / (parameters["rope_theta"] ** exponents)
    return RopeSpec(inverse_frequencies=tuple(frequencies.tolist()), interleaved=interleaved)


def _scaled(config: PretrainedConfig, kind: str, layer_type: str | None, interleaved: bool) -> RopeSpec:
    """The embedding with a scaling, as transformers computes its frequencies."""

    def computed(length: int | None = None) -> tuple[tuple[float, ...], float]:
        cpu = torch.device("cpu")
        with cpu, quiet_transformers():  # the model may be built on the meta device
            frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, cpu, seq_len=length, layer_type=layer_type)
        return tuple(frequencies.tolist()), float(factor)

    short, factor = computed()
    plain = RopeSpec(inverse_frequencies=short, factor=factor, interleaved=interleaved)
    if kind != "longrope":
        return plain
    parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    original = parameters["original_max_position_embeddings"]
    long, _ = computed(original + 1)
    if long == short or original >= config.max_position_embeddings:
        return plain
    return replace(plain, long_inverse_frequencies=long, original_length=original)
