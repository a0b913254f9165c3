"""SmolLM3: Llama's layers, some of them without position embedding, and optionally with a sliding window."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from twotower.errors import ConfigError
from twotower.families import llama
from twotower.families.family import Family
from twotower.specs import AttentionSpec, LayerSpec, TowerSpec


def _spec(config: PretrainedConfig) -> TowerSpec:
    if len(config.no_rope_layers) < config.num_hidden_layers:
        raise ConfigError(
            f"config: no_rope_layers has {len(config.no_rope_layers)} entries for {config.num_hidden_layers} layers; "
            "give one a layer"
        )
    if "sliding_attention" in config.layer_types and not config.use_sliding_window:
        raise ConfigError(
            "config: layer_types has 'sliding_attention', but use_sliding_window is false; change one of the two"
        )
    layers = llama.alternating(config, llama.biased_attention(config), llama.mlp(config))
    return llama.tower(config, [layer if config.no_rope_layers[layer.source] else _unturned(layer) for layer in layers])


def _unturned(layer: LayerSpec) -> LayerSpec:
    """The layer without position embedding. Values of `no_rope_layers` are 0 for these layers."""
    mixer = layer.mixer
    return replace(layer, mixer=replace(mixer, rope=None)) if isinstance(mixer, AttentionSpec) else layer


FAMILY = Family(model_types=("smollm3",), spec=_spec, names=llama.names)
