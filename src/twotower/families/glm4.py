"""GLM-4: norms before and after each mixer, and a rotary embedding of neighbours in a part of each head."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from twotower.families import llama
from twotower.families.family import Family, Names, head_dim
from twotower.families.phi3 import packed_gate_up
from twotower.families.rope import rope_spec
from twotower.specs import LayerSpec, MLPSpec, TowerSpec


def _spec(config: PretrainedConfig) -> TowerSpec:
    attention = replace(llama.attention(config), qkv_bias=config.attention_bias)
    layers = [replace(layer, post_norm=True) for layer in llama.alternating(config, attention, llama.mlp(config))]
    return llama.tower(config, layers, (rope_spec(config, head_dim(config), interleaved=True, partial=True),))


def _names(layer: LayerSpec) -> Names:
    if isinstance(layer.mixer, MLPSpec):
        return {**llama.MLP, **packed_gate_up(layer.mixer), "post_norm": "post_mlp_layernorm"}
    return {**llama.ATTENTION, "post_norm": "post_self_attn_layernorm"}


FAMILY = Family(model_types=("glm4",), spec=_spec, names=_names)
