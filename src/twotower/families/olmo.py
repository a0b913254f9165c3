"""OLMo 2 and 3: norms after each mixer only, and norms of queries and keys over all heads together.

OLMo 3 has layers with a window, whose rotary embedding is not scaled.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from twotower.families import llama
from twotower.families.family import Family, Names
from twotower.specs import LayerSpec, TowerSpec

_ATTENTION: Names = {**llama.ATTENTION, "post_norm": "post_attention_layernorm"}
_MLP: Names = {**llama.MLP, "post_norm": "post_feedforward_layernorm"}


def _names(layer: LayerSpec) -> Names:
    return _ATTENTION if layer.kind == "*" else _MLP


def _layers(config: PretrainedConfig) -> list[LayerSpec]:
    attention = replace(llama.biased_attention(config), qk_norm="width")
    layers = llama.alternating(config, attention, llama.mlp(config))
    return [replace(layer, pre_norm=False, post_norm=True) for layer in layers]


def _olmo2(config: PretrainedConfig) -> TowerSpec:
    return llama.tower(config, _layers(config))


def _olmo3(config: PretrainedConfig) -> TowerSpec:
    return llama.tower(config, *llama.with_ropes_of_layer_types(config, _layers(config)))


OLMO2 = Family(model_types=("olmo2",), spec=_olmo2, names=_names)
OLMO3 = Family(model_types=("olmo3",), spec=_olmo3, names=_names)
