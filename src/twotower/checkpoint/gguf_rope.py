"""The scaling of rotary position embeddings in GGUF files, which transformers leaves out of its translation.

llama.cpp's converter writes linear scaling and YaRN as metadata, Llama 3's scaling and LongRoPE as tensors of divisors
of the frequencies. Each becomes the `rope_scaling` of a config.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from twotower.errors import ConfigError
from twotower.json_text import JsonObject

FREQUENCIES, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
TENSORS = frozenset({FREQUENCIES, SHORT, LONG})
_TYPE, _FACTOR, _ORIGINAL = "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"
_OLD_FACTOR = "rope.scale_linear"
_ATTENTION = "rope.scaling.attn_factor"  # read for LongRoPE
_NOTE = "rope.scaling.finetuned"  # changes nothing
_LOW, _HIGH = 1.0, 4.0  # low_freq_factor and high_freq_factor of all Llama 3 models; the tensor does not have them


class ScaledFile(Protocol):
    """What `GGUFFile` says about a file."""

    path: Path

    def own(self, key: str, default: object = None) -> object: ...

    def own_keys(self) -> Iterable[str]: ...

    def tensor_names(self) -> Iterable[str]: ...

    def values(self, name: str) -> np.ndarray: ...


def scaling_of(file: ScaledFile, backbone: JsonObject) -> JsonObject:
    """The keys of config.json that the scaling of a file adds; empty if its frequencies are not scaled.

    backbone: the config.json without them.

    Raises:
        ConfigError: the scaling cannot be written in a config.json.
    """
    kind = file.own(_TYPE, "linear" if file.own(_OLD_FACTOR, 1.0) != 1.0 else "none")
    present = TENSORS.intersection(file.tensor_names())
    long = present == {SHORT, LONG} and kind in ("none", "longrope")
    read = {_TYPE, _FACTOR, _ORIGINAL, _OLD_FACTOR, _NOTE, *([_ATTENTION] if long else [])}
    others = [key for key in file.own_keys() if key.startswith("rope.scal") and key not in read]
    if others:
        raise _refused(file, others[0])
    if long:
        return _longrope(file)
    if present == {FREQUENCIES} and kind == "none":
        return _llama3(file, backbone)
    if present:
        raise _refused(file, min(present))
    factor = file.own(_FACTOR, file.own(_OLD_FACTOR, 1.0))
    if kind == "none":
        return {}
    if kind == "linear":
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    if kind == "yarn":
        length = file.own(_ORIGINAL, backbone["max_position_embeddings"])
        return {"rope_scaling": {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}}
    raise _refused(file, f"rope.scaling.type {kind!r}")


def partial_of(file: ScaledFile, head_dim: float) -> JsonObject:
    """The key of config.json for heads of which only a part turns; empty if they turn as a whole."""
    turned = file.own("rope.dimension_count", head_dim)
    assert isinstance(turned, int | float)
    return {} if turned == head_dim else {"partial_rotary_factor": turned / head_dim}


def _longrope(file: ScaledFile) -> JsonObject:
    """LongRoPE, with the original length and the factor of attention if the file has them."""
    short, long = (file.values(name).tolist() for name in (SHORT, LONG))
    scaling: JsonObject = {"type": "longrope", "short_factor": short, "long_factor": long}
    if (attention := file.own(_ATTENTION)) is not None:
        scaling["attention_factor"] = attention
    original = file.own(_ORIGINAL)
    length: JsonObject = {} if original is None else {"original_max_position_embeddings": original}
    return length | {"rope_scaling": scaling}


def _refused(file: ScaledFile, what: str) -> ConfigError:
    return ConfigError(
        f"{file.path}: {what} scales the rotary position embedding, and cannot be translated to a config.json; convert "
        "the original checkpoint"
    )


def _llama3(file: ScaledFile, backbone: JsonObject) -> JsonObject:
    """The scaling of Llama 3 whose divisors of the frequencies are those of the file.

    Long waves are divided by `factor`, short ones by 1; those between tell the original length.
    """
    found = file.values(FREQUENCIES).astype(np.float64)
    if (found == 1).all():
        return {}
    theta = backbone.get("rope_theta", 10000.0)
    assert isinstance(theta, int | float)
    waves = 2 * math.pi * float(theta) ** (np.arange(len(found)) / len(found))
    factor = float(found.max())
    for original in _original_lengths(found, waves, factor):
        smooth = ((original / waves - _LOW) / (_HIGH - _LOW)).clip(0, 1)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), found, rtol=1e-4):
            scaling = {"factor": factor, "low_freq_factor": _LOW, "high_freq_factor": _HIGH}
            return {"rope_scaling": {"rope_type": "llama3", **scaling, "original_max_position_embeddings": original}}
    raise _refused(file, FREQUENCIES)


def _original_lengths(found: np.ndarray, waves: np.ndarray, factor: float) -> Iterator[int]:
    between = (found > 1.001) & (found < 0.999 * factor)
    smooth = (1 / found[between] - 1 / factor) / (1 - 1 / factor)
    yield from {round(length) for length in waves[between] * (smooth * (_HIGH - _LOW) + _LOW)}
    yield 8192
