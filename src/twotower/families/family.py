"""`Family`: how one family of autoregressive models becomes a `TowerSpec`, and where its tensors are on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from transformers import PretrainedConfig

from twotower.errors import ConfigError
from twotower.specs import Activation, LayerSpec, TowerSpec

Value = TypeVar("Value")


class Rows(NamedTuple):
    """Rows lo…hi of a tensor on disk that several tensors in memory share. module: the module on disk.

    dim: the dimension of the rows; 1 for stacked experts.
    """

    module: str
    lo: int
    hi: int
    of: int
    dim: int = 0


# The modules of a layer: in memory → on disk, both relative to the layer. "{}" in a module on disk stands for the
# number of an expert that has its own tensors.
Names = Mapping[str, str | Rows]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of autoregressive models.

    model_types: of its config.json. spec: from transformers' configuration. names: of the tensors of a layer. stacked:
    other names of the same tensors, in files that transformers 5 writes without the original layout. embeddings,
    norm_f: the modules of the tower, relative to the root. roots: prefixes of all tensors but the head, the usual one
    first; each with the name of the head. module_root: the prefix of the modules in transformers' class; None: that of
    the first of `roots`.
    """

    model_types: tuple[str, ...]
    spec: Callable[[PretrainedConfig], TowerSpec]
    names: Callable[[LayerSpec], Names]
    stacked: Callable[[LayerSpec], Names] = lambda layer: {}
    embeddings: str = "embed_tokens"
    norm_f: str = "norm"
    roots: tuple[tuple[str, str], ...] = (
        ("model.", "lm_head"),
        ("model.language_model.", "lm_head"),
        ("language_model.model.", "language_model.lm_head"),
        ("model.text_model.", "lm_head"),
    )
    module_root: str | None = None


# Names of activations in config.json.
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
}


def declared(config: PretrainedConfig, key: str, default: Value) -> Value:
    """The value of a key if the family's configuration class declares it; the default otherwise.

    A key in config.json that the class does not declare becomes an attribute of the configuration too. transformers'
    model ignores it, for example `sliding_window` of a Llama model.
    """
    value: Value = getattr(config, key) if key in type(config).__dataclass_fields__ else default
    return value


def activation(config: PretrainedConfig, key: str = "hidden_act") -> Activation:
    """The activation that `key` of the configuration names.

    Raises:
        ConfigError: it is not supported.
    """
    name = getattr(config, key)
    if name not in _ACTIVATIONS:
        raise ConfigError(f"config: {key} is {name!r}; supported are {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[name]


def head_dim(config: PretrainedConfig) -> int:
    """The width of an attention head: `head_dim` if the configuration has it, else hidden_size / heads.

    Raises:
        ConfigError: the heads do not divide the hidden size, or the KV heads the heads.
    """
    heads, kv_heads = config.num_attention_heads, kv_head_count(config)
    if heads % kv_heads:
        raise ConfigError(
            f"config: num_attention_heads is {heads}; it must be a multiple of num_key_value_heads, {kv_heads}"
        )
    given = getattr(config, "head_dim", None)
    if given is None and config.hidden_size % heads:
        raise ConfigError(
            f"config: hidden_size is {config.hidden_size}; without head_dim it must be a multiple of "
            f"num_attention_heads, {heads}"
        )
    return int(config.hidden_size // heads if given is None else given)


def kv_head_count(config: PretrainedConfig) -> int:
    """`num_key_value_heads`, or the number of heads if it is absent."""
    given = getattr(config, "num_key_value_heads", None)
    return int(config.num_attention_heads if given is None else given)


def only(config: PretrainedConfig, key: str, *allowed: object) -> None:
    """Checks that a key has a value that this package implements.

    Raises:
        ConfigError: it has another value.
    """
    value = getattr(config, key, allowed[0])
    if value not in allowed:
        raise ConfigError(f"config: {key} is {value!r}; only {' or '.join(map(repr, allowed))} is supported")
