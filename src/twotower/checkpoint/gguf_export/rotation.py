"""The rotary position embedding of a context tower in a GGUF file: metadata, and tensors of divisors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from twotower.checkpoint.gguf_export.architectures import Architecture
from twotower.checkpoint.gguf_rope import FREQUENCIES, LONG, SHORT
from twotower.config import GenericTwoTowerConfig, TwoTowerConfig
from twotower.errors import ConfigError
from twotower.specs import TowerSpec

Value = int | float | bool | str | list[int] | list[bool] | list[str] | list[float]
_LONG_NOTE = (
    "llama.cpp chooses LongRoPE's factors by the size of its context, not by the length of the text: give it at most "
    "{} tokens of context for texts that fit"
)
# Keys of YaRN, and the values that llama.cpp computes with.
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "truncate": True}


def rotation_keys(
    config: TwoTowerConfig, spec: TowerSpec, architecture: Architecture
) -> tuple[dict[str, Value], dict[str, np.ndarray], list[str]]:
    """The metadata below the architecture's name, the tensors of divisors in fp32, and notes for the user.

    Raises:
        ConfigError: llama.cpp's architecture does not compute the scaling.
    """
    if architecture.rotation == "none" or not isinstance(config, GenericTwoTowerConfig):
        return {}, {}, []
    if architecture.factors and not spec.ropes:
        return {"rope.scaling.finetuned": False}, {}, []
    every: Mapping[str, object] = config.autoregressive.rope_parameters
    main, local = (_section(every, name) for name in ("full_attention", "sliding_attention"))
    keys: dict[str, Value] = {"rope.dimension_count": 2 * len(spec.ropes[-1].inverse_frequencies)}
    keys["rope.freq_base"] = _number(main["rope_theta"])
    if local != main:
        keys["rope.freq_base_swa"] = _number(local["rope_theta"])
        if local.get("rope_type") not in (None, "default"):
            raise _refused("sliding_attention", local, architecture)
    if architecture.name.startswith("qwen35"):  # of pictures; a text has the same position in all sections
        keys["rope.dimension_sections"] = _sections(len(spec.ropes[-1].inverse_frequencies))
    kind = main.get("rope_type", "default")
    if kind == "default":
        return keys, {}, []
    if kind == "linear":
        return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": _number(main["factor"])}, {}, []
    if kind == "yarn":
        return keys | _yarn(main, spec, architecture), {}, []
    if kind == "llama3" and architecture.divisors:
        theta, frequencies = _number(main["rope_theta"]), np.array(spec.ropes[0].inverse_frequencies)
        plain = theta ** (-np.arange(len(frequencies)) / len(frequencies))
        return keys, {FREQUENCIES: (plain / frequencies).astype(np.float32)}, []
    if kind == "longrope" and architecture.packed_qkv:
        return _longrope(keys, main, spec)
    raise _refused("rope_parameters", main, architecture)


def _sections(pairs: int) -> list[int]:
    """The pairs that turn by time, height and width; Qwen 3.5's 32 are 11, 11 and 10."""
    time = -(-pairs // 3)
    height = -(-(pairs - time) // 2)
    return [time, height, pairs - time - height, 0]


def _section(every: Mapping[str, object], name: str) -> Mapping[str, object]:
    found = every.get(name, every)
    assert isinstance(found, Mapping)
    return found


def _yarn(main: Mapping[str, object], spec: TowerSpec, architecture: Architecture) -> dict[str, Value]:
    factor = _number(main["factor"])
    usual = 0.1 * math.log(factor) + 1.0
    others = {**_YARN_DEFAULTS, "attention_factor": usual}
    for key, default in others.items():
        given = main.get(key)
        if given is not None and not math.isclose(_number(given), _number(default), rel_tol=1e-6):
            raise _refused(key, main, architecture)
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(
            _number(main.get("original_max_position_embeddings") or spec.max_position_embeddings)
        ),
    }


def _longrope(
    keys: dict[str, Value], main: Mapping[str, object], spec: TowerSpec
) -> tuple[dict[str, Value], dict[str, np.ndarray], list[str]]:
    original = int(_number(main["original_max_position_embeddings"]))
    keys |= {
        "rope.scaling.type": "longrope",
        "rope.scaling.attn_factor": spec.ropes[0].factor,
        "rope.scaling.original_context_length": original,
    }
    tensors = {name: np.array(main[key], np.float32) for name, key in ((SHORT, "short_factor"), (LONG, "long_factor"))}
    return keys, tensors, [_LONG_NOTE.format(original)]


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)


def _refused(key: str, parameters: Mapping[str, object], architecture: Architecture) -> ConfigError:
    value = parameters.get(key, parameters.get("rope_type"))
    return ConfigError(
        f"config: {key} of the rotary position embedding is {value!r}, which llama.cpp's architecture "
        f"{architecture.name!r} does not compute; twotower export --to one-tower writes the model for other programs"
    )
