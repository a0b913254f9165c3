"""Gemma 1 to 3: norms with 1 + weight, GELU gates, and a factor of the embeddings.

Gemma 2 and 3 have norms before and after each mixer, and alternating windows. Gemma 2 caps the scores of attention and
the logits. Gemma 3 norms queries and keys, and turns them by other frequencies in layers with a window than in layers
without one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PretrainedConfig

from twotower.families import llama
from twotower.families.family import Family, Names, activation, declared, only
from twotower.specs import AttentionSpec, LayerSpec, MLPSpec, RopeSpec, TowerSpec

_ATTENTION: Names = {**llama.ATTENTION, "post_norm": "post_attention_layernorm"}
_MLP: Names = {**llama.MLP, "norm": "pre_feedforward_layernorm", "post_norm": "post_feedforward_layernorm"}


def _names(layer: LayerSpec) -> Names:
    return _ATTENTION if layer.kind == "*" else _MLP


def _layers(config: PretrainedConfig, attention: AttentionSpec) -> list[LayerSpec]:
    only(config, "use_bidirectional_attention", False, None)
    scaled = replace(attention, scale=config.query_pre_attn_scalar**-0.5)
    mlp = MLPSpec(width=config.intermediate_size, activation=activation(config, "hidden_activation"))
    return [replace(layer, post_norm=True) for layer in llama.alternating(config, scaled, mlp)]


def _tower(config: PretrainedConfig, layers: list[LayerSpec], ropes: tuple[RopeSpec, ...] | None = None) -> TowerSpec:
    factor = torch.tensor(config.hidden_size**0.5, dtype=torch.float32, device="cpu")  # as transformers rounds it
    return replace(
        llama.tower(config, layers, ropes),
        norm_offset=1.0,
        embedding_factor=factor.item(),
        logit_softcap=declared(config, "final_logit_softcapping", None),
    )


def _gemma(config: PretrainedConfig) -> TowerSpec:
    only(config, "use_bidirectional_attention", False, None)
    return _tower(config, llama.alternating(config, llama.biased_attention(config), llama.mlp(config)))


def _gemma2(config: PretrainedConfig) -> TowerSpec:
    capped = replace(llama.biased_attention(config), softcap=config.attn_logit_softcapping)
    return _tower(config, _layers(config, capped))


def _gemma3(config: PretrainedConfig) -> TowerSpec:
    """`attn_logit_softcapping` is ignored, as in transformers' Gemma3Attention."""
    normed = replace(llama.biased_attention(config), qk_norm="head")
    return _tower(config, *llama.with_ropes_of_layer_types(config, _layers(config, normed)))


GEMMA = Family(model_types=("gemma",), spec=_gemma, names=llama.names)
GEMMA2 = Family(model_types=("gemma2",), spec=_gemma2, names=_names)
GEMMA3 = Family(model_types=("gemma3_text",), spec=_gemma3, names=_names)
