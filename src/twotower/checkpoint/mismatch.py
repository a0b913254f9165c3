"""Words for weights and a config.json that do not belong together: the keys of the config that a shape comes from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from transformers import PretrainedConfig

from twotower.config import GenericTwoTowerConfig, TwoTowerConfig
from twotower.denoiser_fields import DenoiserConfig
from twotower.errors import CheckpointError

_LAYER = re.compile(r"\blayers\.(\d+)\.")
_EXPERT = re.compile(r"\blayers\.(\d+)\..*\bexperts\.(\d+)\.")
_DENOISER_LAYER = re.compile(r"denoiser_tower\.layers\.(\d+)\.(.*)")
_EXPERT_NUMBER = re.compile(r"(?<=experts\.)\d+\.")
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
_EXPERT_WIDTHS = ("moe_intermediate_size", "intermediate_size")
_DELTA_NET = ("linear_num_key_heads", "linear_key_head_dim", "linear_num_value_heads", "linear_value_head_dim")
_MAMBA = (
    *("mamba_n_heads", "mamba_num_heads", "mamba_d_head", "mamba_head_dim", "mamba_n_groups", "n_groups"),
    *("mamba_d_state", "ssm_state_size", "state_size", "mamba_d_conv", "conv_kernel"),
)
# A part of a tensor's name in memory → keys of config.json that give its shape; the first part found counts.
_KEYS: dict[str, tuple[str, ...]] = {
    "embeddings": ("vocab_size", "hidden_size"),
    "head.": ("vocab_size", "hidden_size"),
    ".q_norm": ("num_attention_heads", "head_dim"),
    ".k_norm": ("num_key_value_heads", "head_dim"),
    ".q_proj": ("num_attention_heads", "head_dim", "hidden_size"),
    ".k_proj": ("num_key_value_heads", "head_dim", "hidden_size"),
    ".v_proj": ("num_key_value_heads", "head_dim", "hidden_size"),
    ".o_proj": ("num_attention_heads", "head_dim", "hidden_size"),
    ".in_proj": ("hidden_size", *_MAMBA, *_DELTA_NET),
    ".conv1d": (*_MAMBA, *_DELTA_NET, "linear_conv_kernel_dim"),
    **dict.fromkeys((".A_log", ".dt_bias", ".D"), (*_MAMBA[:2], "linear_num_value_heads")),
    ".mixer.norm": (*_MAMBA[:4], "linear_value_head_dim"),
    ".out_proj": (*_MAMBA[:4], "linear_num_value_heads", "linear_value_head_dim", "hidden_size"),
    ".gate.": (*_EXPERT_COUNTS, "hidden_size"),
    ".shared_experts": ("moe_shared_expert_intermediate_size", "shared_expert_intermediate_size", "hidden_size"),
    ".experts.": (*_EXPERT_COUNTS, *_EXPERT_WIDTHS, "hidden_size"),
    ".gate_proj": ("intermediate_size", "hidden_size"),
    ".up_proj": ("intermediate_size", "hidden_size"),
    ".down_proj": ("intermediate_size", "hidden_size"),
    "norm": ("hidden_size",),
}


def sources_of_shape(memory: str, config: TwoTowerConfig) -> str:
    """The keys of config.json and their values that give the shape of a tensor: ", from key 1, key 2"; may be empty."""
    keys = next((keys for part, keys in _KEYS.items() if part in memory), ())
    source = _source(config)
    others = source.attribute_map if isinstance(config, GenericTwoTowerConfig) else {}  # other names of the same key
    found = [(key, getattr(source, key, None)) for key in keys if others.get(key) not in keys]
    words = [f"{key} {value}" for key, value in found if isinstance(value, int)]
    return f", from {', '.join(words)}" if words else ""


def check_counts(file: Path, found: Iterable[str], needed: Iterable[str], config: TwoTowerConfig) -> None:
    """Raises CheckpointError if the weights of a generic backbone have other layers or another number of experts."""
    if not isinstance(config, GenericTwoTowerConfig):
        return
    found, needed = list(found), list(needed)
    if config.denoisers is None:
        _check_denoiser(file, found, needed, config.denoiser)
    for name, one in () if config.denoisers is None else config.denoisers.items():
        prefix = f"denoisers.{name}."
        _check_denoiser(file, _names_under(prefix, found), _names_under(prefix, needed), one.choices)
    layers, wanted = (len({m[1] for name in names if (m := _LAYER.search(name))}) for names in (found, needed))
    if layers != wanted:
        raise CheckpointError(
            f"{file}: the weights have {layers} layers, but config.json has num_hidden_layers {wanted}; use the "
            "config.json of these weights"
        )
    experts, selected = _experts(found), _experts(needed)
    for layer, count in experts.items():
        if layer in selected and selected[layer] != count:
            text = config.backbone.get("text_config") or config.backbone
            here = [key for key in _EXPERT_COUNTS if text.get(key) == selected[layer]]
            key = next(key for key in (*here, *_EXPERT_COUNTS) if hasattr(_source(config), key))
            raise CheckpointError(
                f"{file}: layer {layer} has {count} experts, but config.json has {key} {selected[layer]}; use the "
                "config.json of these weights"
            )


def _names_under(prefix: str, names: Iterable[str]) -> list[str]:
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def _check_denoiser(file: Path, found: Iterable[str], needed: Iterable[str], own: DenoiserConfig) -> None:
    """Raises CheckpointError if a denoiser tower has not the layers that config.json names, or other kinds of layers.

    needed: without those of the denoiser if it is not loaded.
    """
    there, wanted = _denoiser_layers(found), _denoiser_layers(needed)
    if not wanted or (own.denoiser_layers is None and own.denoiser_feed_forward is None):
        return
    named = "all layers" if own.denoiser_layers is None else f"denoiser_layers {list(own.denoiser_layers)}"
    if len(there) != len(wanted):
        raise CheckpointError(
            f"{file}: the denoiser tower has {len(there)} layers, but config.json has {named}; use the config.json of "
            "these weights"
        )
    for layer, parts in wanted.items():
        if there.get(layer) != parts:
            number = layer if own.denoiser_layers is None else own.denoiser_layers[layer]
            raise CheckpointError(
                f"{file}: layer {layer} of the denoiser tower is of another kind than config.json says, which makes it "
                f"the counterpart of layer {number}; use the config.json of these weights"
            )


def _denoiser_layers(names: Iterable[str]) -> dict[int, set[str]]:
    """The tensors of each layer of the denoiser tower, without the numbers of experts."""
    layers: dict[int, set[str]] = {}
    for name in names:
        if match := _DENOISER_LAYER.match(name):
            layers.setdefault(int(match[1]), set()).add(_EXPERT_NUMBER.sub("", match[2]))
    return layers


def _experts(names: Iterable[str]) -> dict[str, int]:
    """The number of experts with tensors of their own, by layer."""
    pairs = {(m[1], m[2]) for name in names if (m := _EXPERT.search(name))}
    return {layer: sum(each == layer for each, _ in pairs) for layer, _ in pairs}


def _source(config: TwoTowerConfig) -> PretrainedConfig:
    return config.autoregressive if isinstance(config, GenericTwoTowerConfig) else config
