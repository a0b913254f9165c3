"""Granite: Llama's layers with four factors, of embeddings, scores, residual branches and logits."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from twotower.families import llama
from twotower.families.family import Family
from twotower.specs import LayerSpec, TowerSpec


def with_factors(config: PretrainedConfig, layers: list[LayerSpec]) -> TowerSpec:
    """A tower of these layers, with the factors of residual branches, embeddings and logits."""
    scaled = [replace(layer, residual_factor=config.residual_multiplier) for layer in layers]
    return replace(
        llama.tower(config, scaled),
        embedding_factor=config.embedding_multiplier,
        logit_factor=1.0 / config.logits_scaling,
    )


def _spec(config: PretrainedConfig) -> TowerSpec:
    attention = replace(llama.biased_attention(config), scale=config.attention_multiplier)
    return with_factors(config, llama.alternating(config, attention, llama.mlp(config)))


FAMILY = Family(model_types=("granite",), spec=_spec, names=llama.names)
